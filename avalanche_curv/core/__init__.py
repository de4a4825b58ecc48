"""Past loss as a quadratic model: pure functions and values on torch, SciPy and curvlinops."""

from avalanche_curv.core import curvature, projection, quadratic, risk, structures
from avalanche_curv.core.attachment import Attachment
from avalanche_curv.core.curvature import *  # noqa: F403
from avalanche_curv.core.landscape import *  # noqa: F403
from avalanche_curv.core.landscape import __all__ as _of_landscape  # whose name is that of a function, too
from avalanche_curv.core.losses import ExampleLoss, LossFunction, example_loss
from avalanche_curv.core.projection import *  # noqa: F403
from avalanche_curv.core.quadratic import *  # noqa: F403
from avalanche_curv.core.risk import *  # noqa: F403
from avalanche_curv.core.structures import *  # noqa: F403

__all__ = [
    "Attachment",
    "ExampleLoss",
    "LossFunction",
    "example_loss",
    *curvature.__all__,
    *_of_landscape,
    *projection.__all__,
    *quadratic.__all__,
    *risk.__all__,
    *structures.__all__,
]
