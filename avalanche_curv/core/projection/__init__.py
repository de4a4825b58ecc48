"""Orthogonal projection: steps that stay out of the directions that past tasks need."""

from avalanche_curv.core.projection.eigenspace import Eigenspace
from avalanche_curv.core.projection.input_space import InputSpace
from avalanche_curv.core.projection.projections import (
    GradientProjection,
    Projection,
    Projector,
    SequentialProjection,
    StepProjection,
)
from avalanche_curv.core.projection.protected import FreezeUncovered, LeaveUncovered, ProtectedSpace, Uncovered
from avalanche_curv.core.projection.protection import Protection
from avalanche_curv.core.projection.subspace import Subspace, principal_angles

__all__ = [
    "Eigenspace",
    "FreezeUncovered",
    "GradientProjection",
    "InputSpace",
    "LeaveUncovered",
    "Projection",
    "Projector",
    "ProtectedSpace",
    "Protection",
    "SequentialProjection",
    "StepProjection",
    "Subspace",
    "Uncovered",
    "principal_angles",
]
