"""The directions of a low rank matrix, all equally stiff."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Structure
from avalanche_curv.core.structures.low_rank import LowRank, LowRankMatrix

if TYPE_CHECKING:
    from avalanche_curv.core.curvature import Operator
    from avalanche_curv.core.risk import EmpiricalRisk


@dataclass(frozen=True)
class FlatSpectrum(Structure):
    """V √λ_max: every kept direction is as stiff as the sharpest, C = λ_max V Vᵀ.

    A soft projection: the penalty does not tell kept directions apart. `basis` says which are kept. Sums hold the
    directions of both, each with the stiffness of its own experience.
    """

    basis: LowRank

    def __post_init__(self) -> None:
        if not isinstance(self.basis, LowRank):
            raise TypeError(f"FlatSpectrum takes a LowRank(...); got {self.basis!r}.")
        if self.basis.residual is not None:
            raise ValueError("FlatSpectrum keeps directions only: give LowRank without a residual.")

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> LowRankMatrix:
        return flattened(self.basis.from_operator(operator, risk))

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return self.basis.bytes(space, itemsize)

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        self.basis.check(space, itemsize)


def flattened(matrix: LowRankMatrix) -> LowRankMatrix:
    """Every eigenvalue λ as large as the largest, its sign kept; those that are zero up to rounding are left out."""
    kept = matrix.nonzero()
    return replace(kept, values=kept.values.sign() * kept.values.abs().max()) if len(kept.values) else kept
