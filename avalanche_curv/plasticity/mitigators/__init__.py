"""Mitigators of the loss of plasticity, which work around the steps of any optimiser."""

from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plasticity.mitigators.crelu import CReLU
from avalanche_curv.plasticity.mitigators.l2 import L2, L2Init
from avalanche_curv.plasticity.mitigators.parseval import Parseval
from avalanche_curv.plasticity.mitigators.redo import ReDO
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer
from avalanche_curv.plasticity.mitigators.shrink_perturb import (
    AfterTask,
    EveryStep,
    EverySteps,
    Schedule,
    ShrinkAndPerturb,
)
from avalanche_curv.plasticity.mitigators.spectral import SpectralRegularizer
from avalanche_curv.plasticity.mitigators.streaming_ewc import StreamingEWC
from avalanche_curv.plasticity.mitigators.wasserstein import Wasserstein

__all__ = [
    "L2",
    "AfterTask",
    "CReLU",
    "EveryStep",
    "EverySteps",
    "L2Init",
    "Mitigator",
    "Parseval",
    "ReDO",
    "Regularizer",
    "Schedule",
    "ShrinkAndPerturb",
    "SpectralRegularizer",
    "StreamingEWC",
    "Wasserstein",
]
