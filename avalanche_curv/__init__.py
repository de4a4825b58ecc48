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

if TYPE_CHECKING:
    from avalanche_curv.checkpointing import load_checkpoint, save_checkpoint
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

_LAZY = {
    "ChosenStrength": "first_tasks",
    "CurvatureEWC": "strategies",
    "CurvatureEWCPlugin": "plugins",
    "FromScratch": "metrics",
    "GrowingClasses": "streams",
    "JSONLLogger": "loggers",
    "LabelFlip": "streams",
    "MitigatorPlugin": "plugins",
    "NonStationary": "streams",
    "OrthogonalProjection": "strategies",
    "OrthogonalProjectionPlugin": "plugins",
    "PermutedDigits": "streams",
    "PixelPermutation": "streams",
    "RandomLabels": "streams",
    "RotatedDigits": "streams",
    "ShuffledLabels": "streams",
    "SineBoundary": "streams",
    "SpectralReg": "strategies",
    "SpectralRegPlugin": "plugins",
    "SplitDigits": "streams",
    "choose_strength": "first_tasks",
    "fidelity_metrics": "metrics",
    "landscape_metrics": "metrics",
    "load_checkpoint": "checkpointing",
    "penalty_metrics": "metrics",
    "plasticity_metrics": "metrics",
    "projection_metrics": "metrics",
    "save_checkpoint": "checkpointing",
    "write_hparams": "tensorboard",
    "write_layout": "tensorboard",
}

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
