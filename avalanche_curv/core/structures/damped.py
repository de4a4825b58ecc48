"""C + τI for a matrix of any structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix
from avalanche_curv.core.structures.dense import DenseMatrix
from avalanche_curv.core.structures.diagonal import DiagonalMatrix


def damped_matrix(matrix: Matrix, tau: float) -> Matrix:
    """C + τI, in the same structure where that has room for it.

    >>> damped_matrix(DiagonalMatrix(torch.tensor([1.0, 0.0])), 0.5).values
    tensor([1.5000, 0.5000])
    """
    if isinstance(matrix, DiagonalMatrix):
        return DiagonalMatrix(matrix.values + tau)
    if isinstance(matrix, DenseMatrix):
        return DenseMatrix(matrix.values + tau * torch.eye(matrix.size).to(matrix.values))
    like = matrix.tensors()[0]
    return DampedMatrix(matrix, torch.full((matrix.size,), tau, dtype=like.dtype, device=like.device))


@dataclass(frozen=True)
class DampedMatrix(Matrix):
    """C + diag(d). d is a number for each coordinate, so that those of a model that grows later have none."""

    matrix: Matrix
    diagonal: Float[Tensor, "P"]

    @property
    def size(self) -> int:
        return self.matrix.size

    def product(self, vector: Tensor) -> Tensor:
        return torch.addcmul(self.matrix.product(vector), self.diagonal, vector)

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        parts = self.matrix.products(vector, space)
        for part, diagonal, own in zip(parts, space.split(self.diagonal), space.split(vector)):
            part.addcmul_(diagonal, own)
        return parts

    def plus(self, other: Matrix) -> DampedMatrix:
        if isinstance(other, DampedMatrix):
            return DampedMatrix(self.matrix.plus(other.matrix), self.diagonal + other.diagonal)
        return DampedMatrix(self.matrix.plus(other), self.diagonal)

    def compressed(self) -> DampedMatrix:
        return DampedMatrix(self.matrix.compressed(), self.diagonal)

    def scaled(self, factor: float) -> DampedMatrix:
        return DampedMatrix(self.matrix.scaled(factor), self.diagonal * factor)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> DampedMatrix:
        diagonal = self.diagonal.new_zeros(outer.size)
        diagonal[outer.positions(inner).to(diagonal.device)] = self.diagonal
        return DampedMatrix(self.matrix.embedded(inner, outer), diagonal)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        raise TypeError("The spectrum of a damped matrix is not mended: map that of the matrix, and then damp it.")

    def dense(self) -> Tensor:
        return self.matrix.dense() + self.diagonal.diag()

    def trace(self) -> float:
        return self.matrix.trace() + float(self.diagonal.double().sum())

    def top(self, count: int) -> Pairs:
        values, vectors = self.matrix.top(count)
        if len(values) == count and (values >= 0).all() and (self.diagonal == self.diagonal[0]).all():
            return values + self.diagonal[0], vectors  # the same order: every eigenvalue is τ larger
        return super().top(count)

    def is_finite(self) -> bool:
        return self.matrix.is_finite() and bool(self.diagonal.isfinite().all())

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.matrix.tensors(), self.diagonal)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + self.diagonal.nbytes
