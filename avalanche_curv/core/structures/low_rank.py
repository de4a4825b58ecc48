"""The top of the spectrum: C ≈ Σ_i λ_i v_i v_iᵀ, optionally with the diagonal of what is left."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs, top_of_products
from avalanche_curv.core.options import is_count, is_number
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix, Structure, check_limit, check_memory
from avalanche_curv.core.structures.diagonal import Diagonal

if TYPE_CHECKING:
    from avalanche_curv.core.curvature import Operator
    from avalanche_curv.core.risk import EmpiricalRisk


class Cut(ABC):
    """How many of the top eigenpairs are kept."""

    @abstractmethod
    def most(self) -> int:
        """The largest number that may be kept."""

    @abstractmethod
    def count(self, values: Float[Tensor, "k"], trace: float) -> int:
        """How many of these eigenvalues, in falling order, are kept of a matrix with this trace."""

    def is_enough(self, values: Float[Tensor, "k"], trace: float) -> bool:
        """Whether the cut lies among the eigenvalues given."""
        return len(values) >= self.most()


@dataclass(frozen=True)
class Rank(Cut):
    """The k eigenpairs largest in magnitude."""

    k: int

    def __post_init__(self) -> None:
        if not is_count(self.k):
            raise ValueError(f"Rank(k) needs an integer k of at least 1; got {self.k!r}.")

    def most(self) -> int:
        return self.k

    def count(self, values: Tensor, trace: float) -> int:
        return min(self.k, len(values))


@dataclass(frozen=True)
class Energy(Cut):
    """The fewest top eigenpairs that hold a `fraction` of the trace, at most `most_pairs` of them (with a warning).

    For positive semi-definite curvature: where eigenvalues cancel, a part of the trace means nothing.
    """

    fraction: float
    most_pairs: int = 100

    def __post_init__(self) -> None:
        if not (is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ValueError(f"Energy needs a fraction of the trace in (0, 1]; got {self.fraction!r}.")
        if not is_count(self.most_pairs):
            raise ValueError(f"Energy needs an integer most_pairs of at least 1; got {self.most_pairs!r}.")

    def most(self) -> int:
        return self.most_pairs

    def count(self, values: Tensor, trace: float) -> int:
        if not len(values):
            return 0
        held = values.double().cumsum(0)
        enough = int((held < self.fraction * trace * (1 - 1e-6)).sum()) + 1
        if enough > min(len(values), self.most_pairs):
            here = min(len(values), self.most_pairs)
            share = float(held[here - 1]) / trace if trace else 1.0
            if share < self.fraction * (1 - 1e-3):
                warnings.warn(
                    f"The top {here} eigenpairs hold {share:.1%} of the trace, not {self.fraction:.1%}. "
                    "Raise Energy(most_pairs=...) to keep more.",
                    stacklevel=2,
                )
            return here
        return enough

    def is_enough(self, values: Tensor, trace: float) -> bool:
        return super().is_enough(values, trace) or float(values.double().sum()) >= self.fraction * trace


@dataclass(frozen=True)
class LowRank(Structure):
    """The top eigenpairs, by `Rank(k)` or `Energy(fraction)`: k P numbers, up to `max_bytes`.

    With `residual=Diagonal()` the diagonal of C − V Λ Vᵀ is kept beside them, so that the diagonal stays exact. The sum
    of two is exact and holds the eigenpairs of both, so that memory and step time grow with the number of experiences;
    with `max_rank` a sum is cut to its own top eigenpairs, around the minimum of the exact sum.
    """

    cut: Cut
    residual: Diagonal | None = None
    max_rank: int | None = None
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        check_limit("LowRank", self.max_bytes)
        if not isinstance(self.cut, Cut):
            raise TypeError(f"LowRank takes Rank(k) or Energy(fraction); got {self.cut!r}.")
        if self.residual is not None and not isinstance(self.residual, Diagonal):
            raise TypeError(f"LowRank(residual=...) takes Diagonal() or None; got {self.residual!r}.")
        if self.max_rank is not None and not (is_count(self.max_rank) and self.max_rank >= self.cut.most()):
            raise ValueError(
                f"LowRank(max_rank={self.max_rank!r}) must be an integer of at least the {self.cut.most()} eigenpairs "
                f"that {self.cut} may keep of one experience."
            )

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> LowRankMatrix:
        like = risk.anchor.new_empty(operator.size)

        def product(v: Tensor) -> Tensor:
            return operator.matmat(v[:, None])[:, 0]

        diagonal = Diagonal().from_operator(operator, risk).values if self.needs_diagonal else None
        return self.matrix(lambda count: top_of_products(product, like, count), operator.size, diagonal)

    @property
    def needs_diagonal(self) -> bool:
        """Whether the exact diagonal is asked for, by the residual or for its sum, the trace."""
        return self.residual is not None or isinstance(self.cut, Energy)

    def matrix(self, top: Callable[[int], Pairs], size: int, diagonal: Float[Tensor, "P"] | None) -> LowRankMatrix:
        """From a way to the top pairs, and the exact diagonal where it is needed."""
        trace = 0.0 if diagonal is None else float(diagonal.double().sum())
        most = min(self.cut.most(), size)
        tried = most if isinstance(self.cut, Rank) else min(8, most)
        values, vectors = top(tried)
        while tried < most and len(values) == tried and not self.cut.is_enough(values, trace):
            tried = min(2 * tried, most)
            values, vectors = top(tried)
        kept = self.cut.count(values, trace)
        values, vectors = values[:kept], vectors[:kept].contiguous()
        left = None
        if self.residual is not None and diagonal is not None:
            left = diagonal - torch.einsum("k,kp,kp->p", values, vectors, vectors)
            left[left.abs() <= 1e-6 * diagonal.abs().max()] = 0  # rounding, which may be negative
        return LowRankMatrix(vectors, values, left, self.max_rank)

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        pairs = min(self.cut.most(), space.size)
        return (pairs * (space.size + 1) + (space.size if self.residual else 0)) * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        check_memory(
            f"{self} on {space.size:,} parameters", self.bytes(space, itemsize), self.max_bytes,
            "Keep fewer eigenpairs, use Diagonal(), or raise LowRank(max_bytes=...).",
        )


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


@dataclass(frozen=True)
class LowRankMatrix(Matrix):
    """C = Σ_i λ_i v_i v_iᵀ + diag(d). Sums are exact, of the rank of both; rows need not stay orthogonal."""

    vectors: Float[Tensor, "k P"]
    values: Float[Tensor, "k"]
    diagonal: Float[Tensor, "P"] | None = None
    max_rank: int | None = None

    @property
    def size(self) -> int:
        return self.vectors.shape[1]

    def product(self, vector: Tensor) -> Tensor:
        result = (self.values * (self.vectors @ vector)) @ self.vectors
        return result if self.diagonal is None else result.addcmul_(self.diagonal, vector)

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        weights = self.values * (self.vectors @ vector)
        parts = [(weights @ part.flatten(1)).view(part.shape[1:]) for part in space.split(self.vectors)]
        if self.diagonal is not None:
            for part, diagonal, own in zip(parts, space.split(self.diagonal), space.split(vector)):
                part.addcmul_(diagonal, own)
        return parts

    def plus(self, other: Matrix) -> LowRankMatrix:
        if not isinstance(other, LowRankMatrix):
            raise TypeError(f"A low rank matrix can be added to a low rank matrix only; got {type(other).__name__}.")
        diagonals = [d for d in (self.diagonal, other.diagonal) if d is not None]
        return LowRankMatrix(
            torch.cat([self.vectors, other.vectors]),
            torch.cat([self.values, other.values]),
            sum(diagonals[1:], diagonals[0]) if diagonals else None,
            self.max_rank,
        )

    def compressed(self) -> LowRankMatrix:
        return self if self.max_rank is None or len(self.values) <= self.max_rank else self._cut(self.max_rank)

    def scaled(self, factor: float) -> LowRankMatrix:
        diagonal = None if self.diagonal is None else self.diagonal * factor
        return replace(self, values=self.values * factor, diagonal=diagonal)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> LowRankMatrix:
        where = outer.positions(inner).to(self.vectors.device)
        vectors = self.vectors.new_zeros(len(self.values), outer.size)
        vectors[:, where] = self.vectors
        if self.diagonal is None:
            return replace(self, vectors=vectors)
        diagonal = self.diagonal.new_zeros(outer.size)
        diagonal[where] = self.diagonal
        return replace(self, vectors=vectors, diagonal=diagonal)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> LowRankMatrix:
        """Applied to the kept eigenvalues, and to the entries of the residual diagonal."""
        values, vectors = self._orthogonal()
        diagonal = None if self.diagonal is None else function(self.diagonal)
        return replace(self, vectors=vectors, values=function(values), diagonal=diagonal)

    def dense(self) -> Tensor:
        whole = (self.vectors.T * self.values) @ self.vectors
        return whole if self.diagonal is None else whole + self.diagonal.diag()

    def trace(self) -> float:
        total = float((self.values * self.vectors.square().sum(1)).double().sum())
        return total if self.diagonal is None else total + float(self.diagonal.double().sum())

    def top(self, count: int) -> Pairs:
        if self.diagonal is not None:
            return super().top(count)
        values, vectors = self._orthogonal()
        return values[:count], vectors[:count]

    def tensors(self) -> tuple[Tensor, ...]:
        kept = (self.vectors, self.values)
        return kept if self.diagonal is None else (*kept, self.diagonal)

    def _orthogonal(self) -> Pairs:
        """The eigenpairs of the low rank part, in falling magnitude: its rows are orthogonal until sums are taken."""
        q, r = torch.linalg.qr(self.vectors.T.double())
        values, small = torch.linalg.eigh((r * self.values.double()) @ r.T)
        order = values.abs().argsort(descending=True)
        return values[order].to(self.values), (q @ small[:, order]).T.to(self.vectors).contiguous()

    def _cut(self, rank: int) -> LowRankMatrix:
        """The best approximation of this rank; what it leaves goes to the diagonal where there is one."""
        values, vectors = self._orthogonal()
        diagonal = self.diagonal
        if diagonal is not None:
            diagonal = diagonal + torch.einsum("k,kp,kp->p", values[rank:], vectors[rank:], vectors[rank:])
        return replace(self, vectors=vectors[:rank].contiguous(), values=values[:rank], diagonal=diagonal)


def flattened(matrix: LowRankMatrix) -> LowRankMatrix:
    """Every eigenvalue λ as large as the largest, its sign kept; those that are zero up to rounding are left out."""
    size = matrix.values.abs()
    largest = float(size.max()) if len(size) else 0.0
    kept = size > 100 * torch.finfo(size.dtype).eps * largest
    values, vectors = matrix.values[kept].sign() * largest, matrix.vectors[kept].contiguous()
    return replace(matrix, vectors=vectors, values=values)
