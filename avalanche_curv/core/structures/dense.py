"""All entries of the curvature matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.empirical_fisher import BatchedEmpiricalFisher
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.eigen import Pairs, relative_eigenvalues, spectral_function, symmetrised, top_of_matrix
from avalanche_curv.core.options import settle
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix, Structure, identity_columns, other_options
from avalanche_curv.core.structures.memory import check_limit, check_memory
from avalanche_curv.core.structures.rules import rule


@dataclass(frozen=True)
class Dense(Structure):
    """The whole matrix, for models of a few thousand parameters: P² numbers, up to `max_bytes` (default 4 GiB)."""

    max_bytes: int = 4 * 2**30

    is_mean = True
    is_linear = True

    def __post_init__(self) -> None:
        settle(self, max_bytes=check_limit)

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> Matrix:
        columns = [operator.matmat(part) for _, part in identity_columns(operator.size, risk.anchor)]
        return DenseMatrix(symmetrised(torch.cat(columns, dim=1)))

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return space.size**2 * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        check_memory(
            f"Dense() on {space.size:,} parameters", self.bytes(space, itemsize), self.max_bytes,
            "Use LowRank(Rank(20)), Kronecker(), BlockDiagonal() or Diagonal(), or raise Dense(max_bytes=...).",
        )

    def differs_from(self, matrix: Matrix) -> str | None:
        return other_options(matrix, DenseMatrix)


@dataclass(frozen=True)
class DenseMatrix(Matrix):
    """C as P x P numbers. Sums are exact."""

    values: Float[Tensor, "P P"]

    copies_to_scale = True
    is_decomposed = True

    @property
    def size(self) -> int:
        return len(self.values)

    def product(self, vector: Tensor) -> Tensor:
        return self.values @ vector

    def plus(self, other: Matrix) -> DenseMatrix:
        return DenseMatrix(self.values + other.dense())

    def scaled(self, factor: float) -> DenseMatrix:
        return DenseMatrix(self.values * factor)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> DenseMatrix:
        where = outer.positions(inner).to(self.values.device)
        values = self.values.new_zeros(outer.size, outer.size)
        values[where[:, None], where] = self.values
        return DenseMatrix(values)

    def grown(self, inner: ParameterSpace, outer: ParameterSpace, outputs: tuple[str, ...]) -> DenseMatrix:
        values, rows, known = self.embedded(inner, outer).values, outer.rows(outputs), len(inner.rows(outputs))
        old = rows[:known]
        mean = values[old[:, :, None], old[:, None]].mean(0)
        for row in rows[known:]:
            values[row[:, None], row] = mean
        return DenseMatrix(values)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> DenseMatrix:
        return DenseMatrix(spectral_function(self.values, function))

    def relative_to(self, past: Matrix, rounding: float) -> Tensor | None:
        return relative_eigenvalues(self.values, past.values, rounding) if isinstance(past, DenseMatrix) else None

    def damped(self, tau: float) -> DenseMatrix:
        return DenseMatrix(self.values + tau * torch.eye(self.size).to(self.values))

    def dense(self) -> Tensor:
        return self.values

    def trace(self) -> float:
        return float(self.values.trace())

    def top(self, count: int) -> Pairs:
        return top_of_matrix(self.values, count)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


@rule(OutputCurvature, Dense)
@rule(BatchedEmpiricalFisher, Dense)
def dense_from_rows(curvature: Curvature, structure: Dense, risk: EmpiricalRisk) -> DenseMatrix:
    """Σ GᵀG over the rows G of a kind that has them."""
    total = risk.anchor.new_zeros(risk.space.size, risk.space.size)
    for part in curvature.rows(risk):
        total.addmm_(part.T, part)
    return DenseMatrix(total)
