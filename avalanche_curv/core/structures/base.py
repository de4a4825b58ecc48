"""What a structure is: a recipe that is chosen, and the symmetric matrix that comes of it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.eigen import (
    Pairs,
    inverted,
    largest_of_products,
    top_of_products,
)
from avalanche_curv.core.options import OneLine, in_short
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.state import Storable
from avalanche_curv.core.structures.gradient_pass import GradientPass
from avalanche_curv.core.structures.memory import human_bytes


class CurvatureSource(Protocol):
    """A curvature whose examples lie on several processes, as structures ask for it: see `estimate_sharded`."""

    @property
    def curvature(self) -> Curvature:
        """The kind."""

    @property
    def own(self) -> EmpiricalRisk:
        """The examples of this process."""

    def operator(self) -> Operator:
        """C, by products that are summed over processes."""

    def averaged(self, structure: Structure) -> Matrix:
        """The matrix of a structure all of whose numbers are means over examples (`Structure.is_mean`)."""

    def products_with(self, structure: Structure) -> Operator:
        """C, by products with the matrices that each process makes of its own examples."""

    def subset(self, fraction: float, seed: int) -> CurvatureSource:
        """The curvature of a random part of all examples."""


class Structure(ABC):
    """Which entries of a curvature matrix are kept, and how.

    A structure of your own is this recipe and a `Matrix`. Every policy then works with it, and every kind of
    curvature; `Hessian(psd=...)` only where the eigenvalues of the matrix are at hand (`Matrix.map_spectrum`).
    """

    is_mean: bool = False
    """Whether every number of the matrix is a mean over examples, so that matrices of parts of the data average."""

    is_linear: bool = False
    """Whether its matrix of several examples is the mean of those of each, whatever they are."""

    fits_in_blocks: bool = True
    """Whether it can be read out of products with some of the rows and columns: a block of `BlockDiagonal`."""

    sums_grow: bool = False
    """Whether a sum of its matrices takes more memory with every term."""

    @abstractmethod
    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> Matrix:
        """The matrix of this structure nearest to `operator`, the curvature of `risk`, from products alone."""

    def from_shards(self, source: CurvatureSource) -> Matrix:
        """The matrix of a curvature whose examples lie on several processes, the same on each of them."""
        return source.averaged(self) if self.is_mean else self.from_operator(source.operator(), source.own)

    @abstractmethod
    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        """Bytes of the matrix over `space`, known before it is built, with numbers of `itemsize` bytes."""

    @abstractmethod
    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """Raises MemoryError where `bytes(space, itemsize)` exceeds what this recipe allows, with a remedy."""

    def differs_from(self, matrix: Matrix) -> str | None:
        """What `matrix`, that of a past, is where another recipe made it: its type, or the options by which its sums
        are taken, which those of this recipe would not change. None where nothing shows it, and of a recipe of your own
        unless you define it."""
        return None

    def check_past(self, matrix: Matrix) -> None:
        """Raises TypeError where another recipe made `matrix`, that of a past."""
        undamped = matrix.matrix if isinstance(matrix, DampedMatrix) else matrix
        if (found := self.differs_from(undamped)) is not None:
            raise TypeError(
                f"The past of {found} cannot go on with structure={in_short(self)}. Give the structure that the past "
                "was made with."
            )


def other_options(matrix: Matrix, kind: type[Matrix], **own: object) -> str | None:
    """The type of a `matrix` that is none of `kind`; of one that is, with those of its attributes that are not as in
    `own`; None where all are.

    >>> from avalanche_curv.core.structures.dense import DenseMatrix
    >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
    >>> other_options(DiagonalMatrix(torch.ones(2)), DenseMatrix)
    'DiagonalMatrix'
    """
    name = type(matrix).__name__
    if not isinstance(matrix, kind):
        return name
    held = ((option, getattr(matrix, option)) for option in own)
    others = [f"{option}={in_short(value)}" for option, value in held if value != own[option]]
    return f"{name} with {', '.join(others)}" if others else None


OPERATIONS = {
    "product", "products", "quadratic_form", "plus", "compressed", "scaled", "embedded", "map_spectrum", "damped",
    "largest", "pseudo_inverse", "relative_to", "dense", "trace", "top", "gradient_pass",
}  # fmt: skip


class Matrix(OneLine, Storable, ABC):
    """A symmetric matrix C over a parameter space of size P. Its operations return new matrices, and are computed in
    its own type, also inside `torch.autocast`."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        for name in OPERATIONS & vars(cls).keys():
            setattr(cls, name, in_own_precision(vars(cls)[name]))

    def described(self) -> tuple[str, ...]:
        return f"{self.size} × {self.size}", human_bytes(self.nbytes)

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
        """C + other, for a matrix of the same structure and space. Raises TypeError for another structure."""

    def compressed(self) -> Matrix:
        """C as a sum keeps it: itself, or an approximation where the structure bounds its size."""
        return self

    keeps_range: bool = False
    """Whether the range of `compressed()` holds that of C, if positive semi-definite: C v is never out of its reach."""

    @abstractmethod
    def scaled(self, factor: float) -> Matrix:
        """factor · C."""

    @abstractmethod
    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> Matrix:
        """C as a matrix over `outer`, which holds `inner`; zero in the coordinates that `inner` lacks."""

    def grown(self, inner: ParameterSpace, outer: ParameterSpace, outputs: tuple[str, ...]) -> Matrix:
        """C as a matrix over `outer`, in which the parameters of these names, the weight and the bias of a head, have
        more rows than in `inner`: each later row has the mean of the diagonal blocks of the rows that were there.
        Raises TypeError for a structure that cannot hold it."""
        raise TypeError(
            f"{type(self).__name__} cannot give later outputs the curvature of those that are there. Take Dense(), "
            "Diagonal(), Kronecker() or EKFAC(), or a head that has all outputs from the start."
        )

    def to(self, like: Tensor) -> Matrix:
        """C with what is stored in the type and on the device of `like`: a copy, or C itself where it is so already."""
        held = self.tensors()
        if all(t.dtype == like.dtype and t.device == like.device for t in held):
            return self
        return copy.deepcopy(self, {id(tensor): tensor.to(like) for tensor in held})

    @abstractmethod
    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        """The matrix with `function` applied to its eigenvalues. Raises TypeError where they are not at hand."""

    copies_to_scale: bool = False
    """Whether `scaled` holds as much again as the matrix, which then is better scaled product by product."""

    def largest(self) -> float:
        """λ_max to within one percent, from about ten products unless a structure knows better."""
        return largest_of_products(self.product, self.tensors()[0].new_empty(self.size))

    is_decomposed: bool = False
    """Whether `map_spectrum` has all eigenvalues of C at hand, and gives f(C) exactly for every f with f(0) = 0."""

    def pseudo_inverse(self, rounding: float) -> Matrix | None:
        """C⁺ of a positive semi-definite C: 1/λ in the place of each eigenvalue λ, and 0 for those up to `rounding`
        times the largest, of C or of a block or layer of it. None where the eigenvalues are not at hand. Raises
        ValueError where one is negative beyond that."""
        return self.map_spectrum(partial(inverted, rounding=rounding)) if self.is_decomposed else None

    def relative_to(self, past: Matrix, rounding: float) -> Float[Tensor, "r"] | None:
        """The eigenvalues μ of this matrix H relative to `past`, a matrix C of the same structure and space: those of
        C^{-½} S C^{-½} on the range of C, of rank r, with S the Schur complement of H on it, in double precision.
        Eigenvalues of C up to `rounding` times the largest count as zero. None where they are not at hand.

        >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
        >>> past = DiagonalMatrix(torch.tensor([2.0, 0.0]))
        >>> DiagonalMatrix(torch.tensor([6.0, 5.0])).relative_to(past, rounding=1e-6)
        tensor([3.], dtype=torch.float64)
        """
        return None

    def eigenvectors_beside_diagonal(self) -> tuple[Pairs, Float[Tensor, "P"] | None] | None:
        """((λ, V), d) of a matrix that is stored as Vᵀ diag(λ) V + diag(d), with V [k, P]; d is None where it is zero.
        None for any other matrix."""
        return None

    @property
    def sums_are_cut(self) -> bool:
        """Whether `compressed` may cut a sum, so that it is not exact."""
        return False

    def in_blocks(self, space: ParameterSpace) -> list[tuple[ParameterSpace, Matrix | None]]:
        """The diagonal blocks outside of which C is zero, with their spaces; None for a block of zeros."""
        return [(space, self)]

    def damped(self, tau: float) -> Matrix:
        """C + τI, in the same structure where that can hold it.

        >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
        >>> DiagonalMatrix(torch.tensor([1.0, 0.0])).damped(0.5).values
        tensor([1.5000, 0.5000])
        """
        like = self.tensors()[0]
        return DampedMatrix(self, torch.full((self.size,), tau, dtype=like.dtype, device=like.device))

    @abstractmethod
    def dense(self) -> Float[Tensor, "P P"]:
        """All entries."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""

    @in_own_precision
    def quadratic_form(self, vector: Float[Tensor, "P"]) -> Tensor:
        """vᵀ C v."""
        return vector @ self.product(vector)

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, column by column, as of an `Operator`."""
        return torch.stack([self.product(column.contiguous()) for column in matrix.T], dim=1)

    def products(self, vector: Float[Tensor, "P"], space: ParameterSpace) -> list[Tensor]:
        """C v in the shapes of the parameters, in memory of its own."""
        product = self.product(vector)
        return space.split(product.clone() if product.data_ptr() == vector.data_ptr() else product)

    def gradient_pass(self, anchor: Float[Tensor, "P"], slope: Float[Tensor, "P"] | None) -> GradientPass | None:
        """What adds g + C (θ − a) to gradients step after step, faster than by products; None where nothing does."""
        return None

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
        return all(map(all_finite, self.tensors()))

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for t in self.tensors())


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite: the least and the largest are NaN where one is. `isfinite` of all of them
    takes seven times as long, and a copy."""
    if tensor.is_complex():
        return bool(tensor.isfinite().all())
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


CHUNK = 32


def identity_columns(size: int, like: Tensor) -> Iterator[tuple[int, Float[Tensor, "P k"]]]:
    """Pairs (start, E) where E holds the unit vectors start, ..., start + k - 1, of the type and device of `like`."""
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        columns = like.new_zeros(size, stop - start)
        columns[torch.arange(start, stop), torch.arange(stop - start)] = 1
        yield start, columns


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
        return DampedMatrix(self.matrix.embedded(inner, outer), outer.embedded(self.diagonal, inner))

    def to(self, like: Tensor) -> DampedMatrix:
        return DampedMatrix(self.matrix.to(like), self.diagonal.to(like))

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        raise TypeError("The spectrum of a damped matrix is not mended: map that of the matrix, and then damp it.")

    def pseudo_inverse(self, rounding: float) -> Matrix | None:
        """Where d is one number τ > 0, from f(λ) = 1 / (λ + τ) − 1 / τ, which is 0 at 0: (C + τI)⁻¹ = f(C) + I / τ."""
        tau = self.diagonal[:1]
        if not self.matrix.is_decomposed or not (self.diagonal == tau).all() or tau <= 0:
            return None

        def shifted(values: Tensor) -> Tensor:
            zero = rounding * values.abs().max() if values.numel() else 0.0
            return inverted(torch.where(values.abs() <= zero, values.clamp(min=0), values) + tau) - 1 / tau

        return DampedMatrix(self.matrix.map_spectrum(shifted), 1 / self.diagonal)

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
