"""Quadratic models of past loss for continual learning with Avalanche, and what keeps networks able to learn.

The names of the core are at hand at once; those that need Avalanche are imported when first used.

.. include:: README.md
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from avalanche_curv import core, plasticity
from avalanche_curv.core import *  # noqa: F403
from avalanche_curv.core.hints import elsewhere, nearest
from avalanche_curv.plasticity import *  # noqa: F403

if TYPE_CHECKING:  # mypy sees no further into a star than the texts of `__all__`
    from avalanche_curv.checkpointing import load_checkpoint, save_checkpoint
    from avalanche_curv.core.curvature import *  # noqa: F403
    from avalanche_curv.core.landscape import *  # noqa: F403
    from avalanche_curv.core.projection import *  # noqa: F403
    from avalanche_curv.core.quadratic import *  # noqa: F403
    from avalanche_curv.core.risk import *  # noqa: F403
    from avalanche_curv.core.structures import *  # noqa: F403
    from avalanche_curv.first_tasks import ChosenStrength, choose_strength
    from avalanche_curv.loggers import JSONLLogger
    from avalanche_curv.metrics import (
        FromScratch,
        fidelity_metrics,
        landscape_metrics,
        penalty_metrics,
        plasticity_metrics,
        projection_metrics,
    )
    from avalanche_curv.plugins import (
        CurvatureEWCPlugin,
        MitigatorPlugin,
        OrthogonalProjectionPlugin,
        SpectralRegPlugin,
    )
    from avalanche_curv.strategies import CurvatureEWC, OrthogonalProjection, SpectralReg
    from avalanche_curv.streams import (
        GrowingClasses,
        LabelFlip,
        NonStationary,
        PermutedDigits,
        PixelPermutation,
        RandomLabels,
        RotatedDigits,
        ShuffledLabels,
        SineBoundary,
        SplitDigits,
    )
    from avalanche_curv.tensorboard import write_hparams, write_layout

__version__ = "0.1.0"

_NAMES = {
    "checkpointing": ("load_checkpoint", "save_checkpoint"),
    "first_tasks": ("ChosenStrength", "choose_strength"),
    "loggers": ("JSONLLogger",),
    "metrics": (
        "FromScratch", "fidelity_metrics", "landscape_metrics", "penalty_metrics", "plasticity_metrics",
        "projection_metrics",
    ),
    "plugins": ("CurvatureEWCPlugin", "MitigatorPlugin", "OrthogonalProjectionPlugin", "SpectralRegPlugin"),
    "strategies": ("CurvatureEWC", "OrthogonalProjection", "SpectralReg"),
    "streams": (
        "GrowingClasses", "LabelFlip", "NonStationary", "PermutedDigits", "PixelPermutation", "RandomLabels",
        "RotatedDigits", "ShuffledLabels", "SineBoundary", "SplitDigits",
    ),
    "tensorboard": ("write_hparams", "write_layout"),
}  # fmt: skip
_LAZY = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [*core.__all__, *plasticity.__all__, *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        hint = elsewhere(name)
        if hint is not None and sys._getframe(1).f_code.co_name == "_handle_fromlist":
            raise ImportError(hint)  # `from avalanche_curv import KFAC`, which does not pass on an AttributeError
        remedy = f".{nearest(name, __all__)}" if hint is None else f". {hint}"
        raise AttributeError(f"module 'avalanche_curv' has no attribute '{name}'{remedy}")
    value = globals()[name] = getattr(import_module(f"avalanche_curv.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
