"""Mitigators of the loss of plasticity, which work around the steps of any optimiser."""

from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plasticity.mitigators.crelu import CReLU
from avalanche_curv.plasticity.mitigators.decoupled_isometry import DecoupledIsometry
from avalanche_curv.plasticity.mitigators.fire import FIRE
from avalanche_curv.plasticity.mitigators.l2 import L2, L2Init
from avalanche_curv.plasticity.mitigators.parseval import Parseval
from avalanche_curv.plasticity.mitigators.recycler import Recycler
from avalanche_curv.plasticity.mitigators.redo import ReDO
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer
from avalanche_curv.plasticity.mitigators.schedule import (
    AfterTask,
    EveryStep,
    EverySteps,
    Schedule,
    ScheduledMitigator,
)
from avalanche_curv.plasticity.mitigators.self_normalized_resets import SelfNormalizedResets
from avalanche_curv.plasticity.mitigators.shrink_perturb import ShrinkAndPerturb
from avalanche_curv.plasticity.mitigators.spectral import SpectralRegularizer
from avalanche_curv.plasticity.mitigators.streaming_ewc import StreamingEWC
from avalanche_curv.plasticity.mitigators.wasserstein import Wasserstein

__all__ = [
    "FIRE",
    "L2",
    "AfterTask",
    "CReLU",
    "DecoupledIsometry",
    "EveryStep",
    "EverySteps",
    "L2Init",
    "Mitigator",
    "Parseval",
    "ReDO",
    "Recycler",
    "Regularizer",
    "Schedule",
    "ScheduledMitigator",
    "SelfNormalizedResets",
    "ShrinkAndPerturb",
    "SpectralRegularizer",
    "StreamingEWC",
    "Wasserstein",
]
