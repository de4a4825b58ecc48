"""How able a network is to learn: measures of it, and what keeps it so."""

from avalanche_curv.plasticity.mitigators import (
    L2,
    AfterTask,
    CReLU,
    EveryStep,
    EverySteps,
    L2Init,
    Mitigator,
    Parseval,
    ReDO,
    Regularizer,
    ShrinkAndPerturb,
    SpectralRegularizer,
    StreamingEWC,
    Wasserstein,
)

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
