"""The mathematics: torch and curvlinops only, pure functions and values."""

from avalanche_curv.core import rules as rules  # registers the shortcuts of `estimate`
from avalanche_curv.core.adaptive import AdaptiveRefresh
from avalanche_curv.core.alignment import Alignment, CurvatureDrift, alignment, curvature_drift
from avalanche_curv.core.curvature import (
    GGN,
    Absolute,
    BatchedEmpiricalFisher,
    Clip,
    Curvature,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Operator,
    OutputCurvature,
)
from avalanche_curv.core.damping import Damping, StepBound, Tikhonov
from avalanche_curv.core.estimate import NonFiniteCurvatureError, estimate, rule
from avalanche_curv.core.exact_spectra import GramMatrix, WholeMatrix
from avalanche_curv.core.lanczos import Lanczos
from avalanche_curv.core.landscape import Landscape, landscape
from avalanche_curv.core.losses import ExampleLoss, example_loss
from avalanche_curv.core.mitigators import Mitigator, Regularizer, SpectralRegularizer
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.policies import Accumulate, Merge, Past, Policy, Refresh, Refreshed
from avalanche_curv.core.quadratic import QuadraticModel
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.stability import Guard, Rescale, Stop, UnstablePenaltyError, Warn
from avalanche_curv.core.structures import (
    EKFAC,
    BlockDiagonal,
    Dense,
    Diagonal,
    Energy,
    FlatSpectrum,
    KeepTerms,
    Kronecker,
    LowRank,
    Matrix,
    MatrixFree,
    PerLayer,
    PerParameter,
    PiWeighted,
    Rank,
    Structure,
)
from avalanche_curv.core.trust import AbsoluteError, RatioBand, RelativeError, Trust

__all__ = [
    "EKFAC",
    "GGN",
    "Absolute",
    "AbsoluteError",
    "Accumulate",
    "AdaptiveRefresh",
    "Alignment",
    "BatchedEmpiricalFisher",
    "BlockDiagonal",
    "Clip",
    "Curvature",
    "CurvatureDrift",
    "Damping",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "EmpiricalRisk",
    "Energy",
    "ExampleLoss",
    "Fisher",
    "FlatSpectrum",
    "GramMatrix",
    "Guard",
    "Hessian",
    "KeepTerms",
    "Kronecker",
    "Lanczos",
    "Landscape",
    "LowRank",
    "Matrix",
    "MatrixFree",
    "Merge",
    "Mitigator",
    "NonFiniteCurvatureError",
    "Operator",
    "OutputCurvature",
    "ParameterSpace",
    "Past",
    "PerLayer",
    "PerParameter",
    "PiWeighted",
    "Policy",
    "QuadraticModel",
    "Rank",
    "RatioBand",
    "Refresh",
    "Refreshed",
    "Regularizer",
    "RelativeError",
    "Rescale",
    "SpectralRegularizer",
    "StepBound",
    "Stop",
    "Structure",
    "Tikhonov",
    "Trust",
    "UnstablePenaltyError",
    "Warn",
    "WholeMatrix",
    "alignment",
    "curvature_drift",
    "estimate",
    "example_loss",
    "landscape",
    "rule",
]
