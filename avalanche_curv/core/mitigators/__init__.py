"""What keeps a network able to learn: each mitigator works around the steps of any optimiser."""

from avalanche_curv.core.mitigators.base import Mitigator
from avalanche_curv.core.mitigators.crelu import CReLU
from avalanche_curv.core.mitigators.l2 import L2, L2Init
from avalanche_curv.core.mitigators.parseval import Parseval
from avalanche_curv.core.mitigators.redo import ReDO
from avalanche_curv.core.mitigators.regularizer import Regularizer
from avalanche_curv.core.mitigators.schedule import AfterTask, EveryStep, EverySteps
from avalanche_curv.core.mitigators.shrink_perturb import ShrinkAndPerturb
from avalanche_curv.core.mitigators.spectral import SpectralRegularizer
from avalanche_curv.core.mitigators.streaming_ewc import StreamingEWC
from avalanche_curv.core.mitigators.wasserstein import Wasserstein

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
    "ShrinkAndPerturb",
    "SpectralRegularizer",
    "StreamingEWC",
    "Wasserstein",
]
