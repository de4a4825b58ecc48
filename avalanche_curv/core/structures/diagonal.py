"""The diagonal of the curvature matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix, Structure
from avalanche_curv.core.structures.columns import identity_columns

if TYPE_CHECKING:
    from avalanche_curv.core.curvature import Operator
    from avalanche_curv.core.risk import EmpiricalRisk


@dataclass(frozen=True)
class Diagonal(Structure):
    """The exact diagonal: P numbers, every interaction of two parameters dropped (Kirkpatrick et al. 2017)."""

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> DiagonalMatrix:
        parts = [
            operator.matmat(columns)[start : start + columns.shape[1]].diagonal()
            for start, columns in identity_columns(operator.size, risk.anchor)
        ]
        return DiagonalMatrix(torch.cat(parts))

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        return space.size * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """A diagonal is as large as the model: nothing to refuse."""


@dataclass(frozen=True)
class DiagonalMatrix(Matrix):
    """C = diag(values). Sums are exact."""

    values: Float[Tensor, "P"]

    @property
    def size(self) -> int:
        return len(self.values)

    def product(self, vector: Tensor) -> Tensor:
        return self.values * vector

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        return [values * part for values, part in zip(space.split(self.values), space.split(vector))]

    def plus(self, other: Matrix) -> DiagonalMatrix:
        if not isinstance(other, DiagonalMatrix):
            raise TypeError(f"A diagonal can be added to a diagonal only; got {type(other).__name__}.")
        return DiagonalMatrix(self.values + other.values)

    def scaled(self, factor: float) -> DiagonalMatrix:
        return DiagonalMatrix(self.values * factor)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> DiagonalMatrix:
        values = self.values.new_zeros(outer.size)
        values[outer.positions(inner).to(values.device)] = self.values
        return DiagonalMatrix(values)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> DiagonalMatrix:
        return DiagonalMatrix(function(self.values))

    def dense(self) -> Tensor:
        return self.values.diag()

    def trace(self) -> float:
        return float(self.values.sum())

    def top(self, count: int) -> Pairs:
        order = self.values.abs().argsort(descending=True)[:count]
        vectors = self.values.new_zeros(len(order), self.size)
        vectors[torch.arange(len(order)), order] = 1
        return self.values[order], vectors

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)
