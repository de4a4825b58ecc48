"""The directions of a low rank matrix, all equally stiff."""

from __future__ import annotations

from dataclasses import dataclass, replace

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import CurvatureSource, Matrix, Structure
from avalanche_curv.core.structures.low_rank import LowRank, LowRankMatrix, low_rank, no_energy_of_indefinite
from avalanche_curv.core.structures.rules import refusal, rule


@dataclass(frozen=True)
class FlatSpectrum(Structure):
    """C = λ_max Vᵀ V: every kept direction, a row of V [k, P], is as stiff as the sharpest.

    A soft projection: the penalty does not tell kept directions apart. `basis` says which are kept. Sums hold the
    directions of both, each with the stiffness of its own experience.
    """

    basis: LowRank

    def __post_init__(self) -> None:
        if not isinstance(self.basis, LowRank):
            raise TypeError(f"FlatSpectrum takes a LowRank(...); got {self.basis!r}.")
        if self.basis.residual is not None:
            raise ValueError("FlatSpectrum keeps directions only: give LowRank without a residual.")

    @property
    def sums_grow(self) -> bool:  # type: ignore[override]
        """Whether those of the basis do."""
        return self.basis.sums_grow

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> LowRankMatrix:
        return flattened(self.basis.from_operator(operator, risk))

    def from_shards(self, source: CurvatureSource) -> LowRankMatrix:
        return flattened(source.curvature.mended(self.basis.from_shards(source)))

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return self.basis.bytes(space, itemsize)

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        self.basis.check(space, itemsize)

    def differs_from(self, matrix: Matrix) -> str | None:
        return self.basis.differs_from(matrix)


def flattened(matrix: LowRankMatrix) -> LowRankMatrix:
    """Every eigenvalue λ as large as the largest, its sign kept; those that are zero up to rounding are left out."""
    kept = matrix.nonzero()
    return replace(kept, values=kept.values.sign() * kept.values.abs().max()) if len(kept.values) else kept


@refusal(Curvature, FlatSpectrum)
def no_energy_of_indefinite_basis(curvature: Curvature, structure: FlatSpectrum) -> str | None:
    """Where eigenvalues cancel, the basis cannot be cut at a part of the trace."""
    return no_energy_of_indefinite(curvature, structure.basis)


@rule(Curvature, FlatSpectrum)
def flat_spectrum(curvature: Curvature, structure: FlatSpectrum, risk: EmpiricalRisk) -> LowRankMatrix:
    """The low rank matrix with one eigenvalue for all."""
    return flattened(curvature.mended(low_rank(curvature, structure.basis, risk)))
