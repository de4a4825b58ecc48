"""The mathematics: torch and curvlinops only, pure functions and values."""

from avalanche_curv.core import rules as rules  # registers the shortcuts of `estimate`
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
from avalanche_curv.core.estimate import NonFiniteCurvatureError, estimate, rule
from avalanche_curv.core.losses import ExampleLoss, example_loss
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.policies import Accumulate, Merge, Past, Policy, Refresh
from avalanche_curv.core.quadratic import QuadraticModel
from avalanche_curv.core.risk import EmpiricalRisk
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

__all__ = [
    "EKFAC",
    "GGN",
    "Absolute",
    "Accumulate",
    "BatchedEmpiricalFisher",
    "BlockDiagonal",
    "Clip",
    "Curvature",
    "Dense",
    "Diagonal",
    "EmpiricalFisher",
    "EmpiricalRisk",
    "Energy",
    "ExampleLoss",
    "Fisher",
    "FlatSpectrum",
    "Hessian",
    "KeepTerms",
    "Kronecker",
    "LowRank",
    "Matrix",
    "MatrixFree",
    "Merge",
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
    "Refresh",
    "Structure",
    "estimate",
    "example_loss",
    "rule",
]
