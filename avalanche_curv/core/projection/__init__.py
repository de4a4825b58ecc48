"""Projection: steps that stay out of what past tasks need."""

from avalanche_curv.core.projection.eigenspace import Eigenspace
from avalanche_curv.core.projection.input_space import InputSpace
from avalanche_curv.core.projection.projections import Gradient, Projection, Projector, Sequential, Step
from avalanche_curv.core.projection.protected import ProtectedSpace
from avalanche_curv.core.projection.protection import Protection
from avalanche_curv.core.projection.uncovered import Freeze, Leave, Uncovered

__all__ = [
    "Eigenspace",
    "Freeze",
    "Gradient",
    "InputSpace",
    "Leave",
    "Projection",
    "Projector",
    "ProtectedSpace",
    "Protection",
    "Sequential",
    "Step",
    "Uncovered",
]
