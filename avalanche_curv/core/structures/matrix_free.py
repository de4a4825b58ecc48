"""No matrix at all: products through the frozen model, whose linearisation is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.hessian import Hessian
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.curvature.products import Linearised, right_products
from avalanche_curv.core.curvature.second_derivatives import LinearisedHessian, is_differentiated_twice, moving
from avalanche_curv.core.eigen import symmetrised
from avalanche_curv.core.options import check_fraction, check_seed, settle
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import CurvatureSource, Matrix, Structure, identity_columns, other_options
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.rules import refusal, rule, structured


@dataclass(frozen=True)
class MatrixFree(Structure):
    """The exact curvature of a random `fraction` of the examples, drawn by `seed`; each product passes over them.

    Held: these examples, a copy of the model, and, after the first product, the activations of two passes over them
    (several times as much as `nbytes` says, which counts neither). Sums keep a list, so that
    memory and step time grow with the number of experiences.
    """

    fraction: float = 1.0
    seed: int = 0

    fits_in_blocks = False
    sums_grow = True

    def __post_init__(self) -> None:
        settle(self, fraction=check_fraction, seed=check_seed)

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> MatrixFreeMatrix:
        return MatrixFreeMatrix(operator.size, risk.anchor.new_empty(0), (OperatorTerm(operator),))

    def from_shards(self, source: CurvatureSource) -> MatrixFreeMatrix:
        chosen = source if self.fraction == 1 else source.subset(self.fraction, self.seed)
        return self.from_operator(chosen.products_with(replace(self, fraction=1.0)), chosen.own)

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        """The frozen model; examples and activations, which come on top, are not known from the parameters."""
        return space.size * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """Nothing is refused: there is no matrix."""

    def differs_from(self, matrix: Matrix) -> str | None:
        return other_options(matrix, MatrixFreeMatrix)


@dataclass(frozen=True)
class OperatorTerm:
    """factor · E C Eᵀ, with C an operator and E its embedding at `where` in a larger space; `own` is an empty tensor in
    the type and on the device of C, where these are not those of the vectors."""

    operator: Operator
    factor: float = 1.0
    where: Tensor | None = None
    own: Float[Tensor, "0"] | None = None

    def product(self, vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        inner = vector if self.where is None else vector[self.where]
        inner = inner if self.own is None else inner.to(self.own)
        found = (self.factor * self.operator.matmat(inner[:, None])[:, 0]).to(vector)
        if self.where is None:
            return found
        result = torch.zeros_like(vector)
        result[self.where] = found
        return result

    def trace(self) -> float | None:
        """factor · tr C, where the operator knows it without products."""
        known = getattr(self.operator, "trace", None)
        return None if known is None else self.factor * known()


@dataclass(frozen=True)
class MatrixFreeMatrix(Matrix):
    """Σ_j C_j over P coordinates, each term known by its products; `like` is an empty tensor of their type."""

    size: int
    like: Float[Tensor, "0"]
    terms: tuple[OperatorTerm, ...]

    def product(self, vector: Tensor) -> Tensor:
        return sum((term.product(vector) for term in self.terms[1:]), self.terms[0].product(vector))

    def plus(self, other: Matrix) -> MatrixFreeMatrix:
        if not isinstance(other, MatrixFreeMatrix):
            raise TypeError(f"Without a matrix only another such can be added; got {type(other).__name__}.")
        return replace(self, terms=(*self.terms, *other.terms))

    def scaled(self, factor: float) -> MatrixFreeMatrix:
        return replace(self, terms=tuple(replace(t, factor=factor * t.factor) for t in self.terms))

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> MatrixFreeMatrix:
        where = outer.positions(inner).to(self.like.device)
        placed = (replace(t, where=where if t.where is None else where[t.where]) for t in self.terms)
        return MatrixFreeMatrix(outer.size, self.like, tuple(placed))

    def to(self, like: Tensor) -> MatrixFreeMatrix:
        """For vectors like `like`; products are still taken where the frozen model is, in its type."""
        moved = (
            replace(
                t,
                where=None if t.where is None else t.where.to(like.device),
                own=self.like if t.own is None else t.own,
            )
            for t in self.terms
        )
        return replace(self, like=like.new_empty(0), terms=tuple(moved))

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        raise TypeError(
            "The eigenvalues of a matrix known by its products are not at hand, so a Hessian cannot be mended by psd. "
            "Use Hessian() with MatrixFree, or Hessian(psd=...) with LowRank, BlockDiagonal, Diagonal or Dense."
        )

    def dense(self) -> Tensor:
        columns = [self.product(c) for _, some in identity_columns(self.size, self.like) for c in some.T]
        return symmetrised(torch.stack(columns))

    def trace(self) -> float:
        traces = [term.trace() for term in self.terms]
        known = [trace for trace in traces if trace is not None]
        return sum(known) if len(known) == len(traces) else super().trace()

    def is_finite(self) -> bool:
        """Whether one product of all coordinates is: nothing is stored that could be looked at."""
        return bool(self.product(self.like.new_ones(self.size)).isfinite().all())

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.like,)

    @property
    def nbytes(self) -> int:
        """What the operators say of themselves: examples and a frozen model, without activations."""
        return sum(int(getattr(term.operator, "nbytes", 0)) for term in self.terms)


BATCH = 256  # examples of one graph


@rule(Curvature, MatrixFree)
def by_operator(curvature: Curvature, structure: MatrixFree, risk: EmpiricalRisk) -> MatrixFreeMatrix:
    """The kind's own operator, on the chosen examples."""
    return structure.from_operator(curvature.operator(_chosen(structure, risk)), risk)


class TracedLinearised(Linearised):
    """A linearisation that knows its trace."""

    curvature: OutputCurvature

    def trace(self) -> float:
        """tr C, from the exact diagonal."""
        return structured(self.curvature, Diagonal(), self.risk).trace()


@rule(OutputCurvature, MatrixFree)
def linearised(curvature: OutputCurvature, structure: MatrixFree, risk: EmpiricalRisk) -> MatrixFreeMatrix:
    """J and Jᵀ from graphs that are kept."""
    chosen = _chosen(structure, risk).rebatched(BATCH)
    return structure.from_operator(right_products(curvature, chosen, {"graphs": TracedLinearised}), risk)


@rule(Hessian, MatrixFree)
def linearised_hessian(curvature: Hessian, structure: MatrixFree, risk: EmpiricalRisk) -> MatrixFreeMatrix:
    """The derivative of the gradient, whose graph is kept where that is right."""
    chosen = _chosen(structure, risk).rebatched(BATCH)
    right = is_differentiated_twice(risk)
    operator = moving(LinearisedHessian(chosen), chosen) if right else curvature.operator(chosen)
    return structure.from_operator(operator, risk)


@refusal(Curvature, MatrixFree)
def no_spectrum_to_mend(curvature: Curvature, structure: MatrixFree) -> str | None:
    """To mend a spectrum takes eigenvalues."""
    if not curvature.is_mended:
        return None
    return (
        f"{curvature} cannot be mended where only products are known. Use Hessian() or GGN() with MatrixFree, or "
        f"{curvature} with LowRank, BlockDiagonal, Diagonal or Dense."
    )


def _chosen(structure: MatrixFree, risk: EmpiricalRisk) -> EmpiricalRisk:
    return risk if structure.fraction == 1 else risk.subset(structure.fraction, structure.seed)
