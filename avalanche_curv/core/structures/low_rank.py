"""The top of the spectrum: C ≈ Σ_i λ_i v_i v_iᵀ, optionally with the diagonal of what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.eigen import WHOLE, Pairs, top_of_matrix, top_of_operator
from avalanche_curv.core.options import check_count, optional, settle
from avalanche_curv.core.per_example.gram import gram_rows, rows_operator, top_pairs
from avalanche_curv.core.per_example.narrow import top_of_rows
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import CurvatureSource, Matrix, Structure, other_options
from avalanche_curv.core.structures.cuts import Cut
from avalanche_curv.core.structures.dense import Dense
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.memory import check_limit, check_memory
from avalanche_curv.core.structures.rules import refusal, rule, structured


@dataclass(frozen=True)
class LowRank(Structure):
    """The top eigenpairs, by `Rank(k)` or `Energy(fraction)`: k P numbers, up to `max_bytes`.

    They are exact where there are up to 1,000 parameters, or 3,000 rows; otherwise good to a residual of 1e-5 of the
    eigenvalue, and on wide linear layers, for up to 16 of them, to an estimated 2e-4 of the eigenvalue itself.

    With `residual=Diagonal()` the diagonal of C − V Λ Vᵀ is kept beside them, so that the diagonal stays exact. The sum
    of two is exact and holds the eigenpairs of both, so that memory and step time grow with the number of experiences;
    with `max_rank` a sum is cut to its own top eigenpairs, around the minimum of the exact sum. On the CPU and one
    thread a penalty reads eigenvectors of 2^21 numbers and more in 16 bits, off by 3e-5 of their size (`LowRankPass`).
    """

    cut: Cut
    residual: Diagonal | None = None
    max_rank: int | None = None
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        settle(self, max_bytes=check_limit)
        if not isinstance(self.cut, Cut):
            raise TypeError(f"LowRank takes Rank(k) or Energy(fraction); got {self.cut!r}.")
        if self.residual is not None and not isinstance(self.residual, Diagonal):
            raise TypeError(f"LowRank(residual=...) takes Diagonal() or None; got {self.residual!r}.")
        settle(self, max_rank=optional(check_count))
        if self.max_rank is not None and self.max_rank < self.cut.most():
            raise ValueError(
                f"LowRank(max_rank={self.max_rank!r}) must be an integer of at least the {self.cut.most()} eigenpairs "
                f"that {self.cut} may keep of one experience."
            )

    @property
    def sums_grow(self) -> bool:  # type: ignore[override]
        """Unless `max_rank` bounds them."""
        return self.max_rank is None

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> LowRankMatrix:
        like = risk.anchor.new_empty(operator.size)
        diagonal = Diagonal().from_operator(operator, risk).values if self.needs_diagonal else None
        return self.matrix(lambda count: top_of_operator(operator, like, count), operator.size, diagonal)

    def from_shards(self, source: CurvatureSource) -> LowRankMatrix:
        size, anchor = source.own.space.size, source.own.anchor
        if size <= WHOLE:
            whole = source.averaged(Dense()).dense()
            return self.matrix(lambda count: top_of_matrix(whole, count), size, whole.diagonal())
        operator = source.operator()
        diagonal = source.averaged(Diagonal()).tensors()[0] if self.needs_diagonal else None
        return self.matrix(lambda count: top_of_operator(operator, anchor, count), size, diagonal)

    @property
    def needs_diagonal(self) -> bool:
        """Whether the exact diagonal is asked for, by the residual or for its sum, the trace."""
        return self.residual is not None or self.cut.needs_trace

    def matrix(self, top: Callable[[int], Pairs], size: int, diagonal: Float[Tensor, "P"] | None) -> LowRankMatrix:
        """The matrix from a function that gives the top eigenpairs, and the exact diagonal where `needs_diagonal`."""
        trace = 0.0 if diagonal is None else float(diagonal.double().sum())
        most = min(self.cut.most(), size)
        tried = min(8, most) if self.cut.needs_trace else most
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

    def differs_from(self, matrix: Matrix) -> str | None:
        return other_options(matrix, LowRankMatrix, residual=self.residual, max_rank=self.max_rank)


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

    @property
    def residual(self) -> Diagonal | None:
        """What is kept of the residual."""
        return None if self.diagonal is None else Diagonal()

    def product(self, vector: Tensor) -> Tensor:
        result = (self.values * (self.vectors @ vector)) @ self.vectors
        return result if self.diagonal is None else result.addcmul_(self.diagonal, vector)

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        weights = self.values * (self.vectors @ vector)
        parts = [
            (weights @ (part.flatten(1) if part.ndim > 1 else part[:, None])).view(part.shape[1:])
            for part in space.split(self.vectors)
        ]
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
        diagonal = None if self.diagonal is None else outer.embedded(self.diagonal, inner)
        return replace(self, vectors=outer.embedded(self.vectors, inner), diagonal=diagonal)

    @property
    def is_decomposed(self) -> bool:  # type: ignore[override]
        """Without a diagonal beside the eigenpairs."""
        return self.diagonal is None

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> LowRankMatrix:
        """Applied to the kept eigenvalues, and to the entries of the residual diagonal."""
        values, vectors = self._orthogonal()
        diagonal = None if self.diagonal is None else function(self.diagonal)
        return replace(self, vectors=vectors, values=function(values), diagonal=diagonal)

    @property
    def sums_are_cut(self) -> bool:
        return self.max_rank is not None

    def eigenvectors_beside_diagonal(self) -> tuple[Pairs, Tensor | None]:
        return (self.values, self.vectors), self.diagonal

    def nonzero(self) -> LowRankMatrix:
        """Without eigenvalues that are zero up to rounding, whose eigenvectors mean nothing."""
        size = self.values.abs()
        kept = size > 100 * torch.finfo(size.dtype).eps * (float(size.max()) if len(size) else 0.0)
        if kept.all():
            return self
        return replace(self, vectors=self.vectors[kept].contiguous(), values=self.values[kept])

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

GRAM_ROWS = 3000  # the largest Gram matrix that is decomposed


@rule(Curvature, LowRank)
def low_rank(curvature: Curvature, structure: LowRank, risk: EmpiricalRisk) -> LowRankMatrix:
    """The top eigenpairs by the fastest method for this size; trace and residual from the exact diagonal."""
    top = _top(curvature, risk)
    diagonal = structured(curvature, Diagonal(), risk).tensors()[0] if structure.needs_diagonal else None
    return structure.matrix(top, risk.space.size, diagonal)


def _top(curvature: Curvature, risk: EmpiricalRisk) -> Callable[[int], Pairs]:
    """The top eigenpairs by their number: from the whole matrix, from the Gram matrix of its rows, or by products."""
    if risk.space.size <= WHOLE:
        whole = structured(curvature, Dense(), risk).dense()
        return lambda count: top_of_matrix(whole, count)
    gram = gram_rows(curvature, risk, GRAM_ROWS)
    if gram is not None:
        return lambda count: top_pairs(gram, risk.space, count)
    rows = rows_operator(curvature, risk)
    if rows is not None:
        return lambda count: top_of_rows(rows, risk.anchor, count)
    operator = curvature.operator(risk)
    return lambda count: top_of_operator(operator, risk.anchor, count)


@refusal(Curvature, LowRank)
def no_energy_of_indefinite(curvature: Curvature, structure: LowRank) -> str | None:
    """Where eigenvalues cancel, a part of the trace means nothing."""
    if curvature.is_semidefinite or not structure.cut.needs_trace:
        return None
    return (
        f"{structure.cut} needs a positive semi-definite curvature, and {curvature} may be indefinite. Use Rank(k), or "
        "say is_semidefinite = True of a kind of your own."
    )
