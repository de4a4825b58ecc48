"""What a structure is: a recipe that is chosen, and the symmetric matrix that comes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs, top_of_products
from avalanche_curv.core.options import is_count
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.columns import identity_columns

if TYPE_CHECKING:
    from avalanche_curv.core.curvature import Operator
    from avalanche_curv.core.risk import EmpiricalRisk


class Structure(ABC):
    """Which entries of a curvature matrix are kept, and how.

    A structure of your own is this recipe and a `Matrix`; every curvature kind and policy then works with it.
    """

    @abstractmethod
    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> Matrix:
        """The matrix of this structure nearest to `operator`, the curvature of `risk`, from products alone."""

    @abstractmethod
    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        """Memory of the matrix, known before it is built."""

    @abstractmethod
    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """Raises MemoryError where `bytes` exceeds what this recipe allows."""


class Matrix(ABC):
    """A symmetric matrix C over a parameter space of size P. Its operations return new matrices."""

    if TYPE_CHECKING:

        @property
        def size(self) -> int:
            """P."""
            ...

    @abstractmethod
    def product(self, vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """C v."""

    @abstractmethod
    def plus(self, other: Matrix) -> Matrix:
        """C + other, where other is of the same structure and space."""

    def compressed(self) -> Matrix:
        """C as a sum keeps it: itself, or an approximation where the structure bounds its size."""
        return self

    @abstractmethod
    def scaled(self, factor: float) -> Matrix:
        """factor · C."""

    @abstractmethod
    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> Matrix:
        """C as a matrix over `outer`, which holds `inner`; zero in the coordinates that `inner` lacks."""

    @abstractmethod
    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        """`function` applied to the eigenvalues. Raises TypeError where they are not at hand."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "P P"]:
        """All entries."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""

    def quadratic_form(self, vector: Float[Tensor, "P"]) -> Tensor:
        """vᵀ C v."""
        return vector @ self.product(vector)

    def products(self, vector: Float[Tensor, "P"], space: ParameterSpace) -> list[Tensor]:
        """C v in the shapes of the parameters, in memory of its own."""
        product = self.product(vector)
        return space.split(product.clone() if product.data_ptr() == vector.data_ptr() else product)

    def trace(self) -> float:
        """Σ_i C_ii, from P products unless a structure knows better."""
        total = 0.0
        for start, columns in identity_columns(self.size, self.tensors()[0]):
            total += sum(float(self.product(column)[start + i]) for i, column in enumerate(columns.T))
        return total

    def top(self, count: int) -> Pairs:
        """The `count` eigenvalues largest in magnitude, largest first, and their eigenvectors as rows [count, P].

        Fewer where a structure holds fewer: the others are zero. From products, to a residual of 1e-5 of the
        eigenvalue, unless a structure knows better.
        """
        return top_of_products(self.product, self.tensors()[0].new_empty(self.size), count)

    def is_finite(self) -> bool:
        """Whether no stored number is NaN or infinite."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for t in self.tensors())


def check_memory(name: str, needed: int, allowed: int, remedy: str) -> None:
    """Raises MemoryError with both sizes and a remedy if `needed` exceeds `allowed` bytes."""
    if needed > allowed:
        raise MemoryError(
            f"{name} needs {human_bytes(needed)} for its matrix, over its limit of {human_bytes(allowed)}. {remedy}"
        )


def check_limit(name: str, max_bytes: object) -> None:
    """Raises ValueError for a limit that is no number of bytes."""
    if not is_count(max_bytes):
        raise ValueError(f"{name}(max_bytes=...) needs an integer of at least 1; got {max_bytes!r}. 2**30 is a GiB.")


def human_bytes(count: float) -> str:
    """A size for people.

    >>> human_bytes(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def symmetrised(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric part: rounding makes computed columns and rows differ."""
    return (matrix + matrix.T) / 2


def spectral_function(matrix: Float[Tensor, "n n"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "n n"]:
    """V f(Λ) Vᵀ for the symmetric matrix V Λ Vᵀ, in float64."""
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    return ((vectors * function(eigenvalues)) @ vectors.T).to(matrix)
