"""Products with the curvature of a risk, through graphs that are kept or made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.curvature.operators import FactorInOutputs, Operator, factor_of, pieces
from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.nested import Nested, leaves
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import Graphs
from avalanche_curv.core.risk.jacobians import parameters_of, pulled_back
from avalanche_curv.core.risk.trust import directions, right_way


class OfRisk:
    """What every operator on a risk says of itself."""

    risk: EmpiricalRisk

    @property
    def size(self) -> int:
        return self.risk.space.size

    @property
    def nbytes(self) -> int:
        """The frozen model and the examples."""
        data = sum(t.nbytes for batch in self.risk.batches for t in leaves(batch))
        return data + sum(p.nbytes for p in self.risk.base.parameters())


class HasRows(FactorInOutputs, Protocol):
    """A kind (1/N) Σ_i J_iᵀ S_i S_iᵀ J_i that gives the rows of its root too."""

    def rows(self, risk: EmpiricalRisk) -> Iterator[Float[Tensor, "n P"]]: ...


@dataclass(frozen=True)
class FromRows(OfRisk):
    """GᵀG from the rows G of a kind, computed anew for each product: slow, and right for any model."""

    curvature: HasRows
    risk: EmpiricalRisk

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M."""
        total = torch.zeros_like(matrix)
        for rows in self.curvature.rows(self.risk):
            total += rows.T @ (rows @ matrix)
        return total


@dataclass(frozen=True)
class _OneColumn:
    """S of one column, with which the derivatives of the outputs are tried: they do not depend on S."""

    def factor(
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Nested, generator: torch.Generator
    ) -> Float[Tensor, "N C 1"]:
        return torch.linspace(1, 2, outputs.shape[1]).to(outputs).expand_as(outputs)[:, :, None]

    def generator(self) -> torch.Generator:
        return torch.Generator()

    def rows(self, risk: EmpiricalRisk) -> Iterator[Float[Tensor, "n P"]]:
        for x, y in risk:
            with torch.no_grad():
                factor = self.factor(risk.loss, risk.outputs(x), y, self.generator()) / risk.examples**0.5
            yield pulled_back(risk, parameters_of(risk), x, factor)[:, 0]


Way = Callable[[Any, EmpiricalRisk], Operator]


def right_products(curvature: HasRows, risk: EmpiricalRisk, ways: Mapping[str, Way]) -> Operator:
    """The operator that the first of these ways makes of a kind (given by S) and a risk, whose products are those of
    the rows G on two examples; `FromRows` where none is right."""
    trial = risk.trial(2)
    vectors = directions(risk.space.size, 1, like=risk.anchor)

    def tried(way: Way) -> Callable[[], list[Tensor]]:
        return lambda: risk.space.split(way(_OneColumn(), trial).matmat(vectors)[:, 0])

    what = f"products by {' or '.join(ways)}"
    name = right_way(risk, what, {name: tried(way) for name, way in ways.items()}, tried(FromRows), "rows")
    return ways.get(name, FromRows)(curvature, risk)


@dataclass(frozen=True)
class Relinearised(OfRisk):
    """(1/N) Σ_i J_iᵀ S_i S_iᵀ J_i from the graphs of f and of w ↦ Jᵀw, whose derivative in w is J: made anew for each
    product, one batch at a time.

    Products with J need no forward-mode derivatives, which torch lacks for many modules.
    """

    curvature: FactorInOutputs
    risk: EmpiricalRisk

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, column by column."""
        total = torch.zeros_like(matrix)
        for batch in self._batches():
            total += batch.matmat(matrix)
        return total / self.risk.examples

    def _batches(self) -> Iterable[_Batch]:
        return self._made(pieces(self.curvature, self.risk))

    def _made(self, parts: Iterable[tuple[Nested, Nested]]) -> Iterator[_Batch]:
        generator = self.curvature.generator()
        return (_Batch(self.curvature, self.risk, x, y, generator) for x, y in parts)


class Linearised(Relinearised):
    """(1/N) Σ_i J_iᵀ S_i S_iᵀ J_i from graphs of whole batches, which are made once and kept for all products."""

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not stored: they are computed again."""
        return {"curvature": self.curvature, "risk": self.risk}

    def _batches(self) -> Iterable[_Batch]:
        return self._graphs.value

    @cached_property
    def _graphs(self) -> Graphs[list[_Batch]]:
        return Graphs(self.risk.base, lambda: [*self._made(self.risk)])


class _Batch:
    """One batch, ready for products."""

    @torch.enable_grad()
    def __init__(
        self, curvature: FactorInOutputs, risk: EmpiricalRisk, x: Nested, y: Tensor, generator: torch.Generator
    ) -> None:
        self.space, self.parameters = risk.space, risk.parameters
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention lack second derivatives
            self.outputs = risk.outputs(x)
        values = self.outputs.detach()
        self.factor = factor_of(curvature, risk, values, y, generator)
        self.weights = torch.zeros_like(values, requires_grad=True)
        self.pullback = tuple(torch.zeros_like(p) for p in self.parameters)
        if self.outputs.requires_grad:
            self.pullback = torch.autograd.grad(
                self.outputs, self.parameters, self.weights,
                create_graph=True, allow_unused=True, materialize_grads=True,
            )

    @torch.enable_grad()
    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """Σ_i J_iᵀ S_i S_iᵀ J_i M."""
        return torch.stack([self.space.flatten(self._product(column)) for column in matrix.T], dim=1)

    def _product(self, vector: Float[Tensor, "P"]) -> list[Tensor]:
        direction = [part.contiguous() for part in self.space.split(vector)]
        reached = [(p, v) for p, v in zip(self.pullback, direction) if p.requires_grad]
        if not reached:
            return [torch.zeros_like(part) for part in direction]
        functions, vectors = zip(*reached)
        (change,) = torch.autograd.grad(functions, self.weights, vectors, retain_graph=True)
        parts = torch.autograd.grad(
            self.outputs, self.parameters, self.factor.times(change),
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )
        return list(parts)
