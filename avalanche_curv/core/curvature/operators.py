"""Symmetric matrices known by their products."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.losses.factor import Factor, as_factor
from avalanche_curv.core.nested import Nested, examples, index, repeated, shapes, split
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import as_matrix

FACTOR_BYTES = 32 * 2**20  # of the factors S of examples that are worked on at once


class Operator(Protocol):
    """A symmetric matrix known by its products: `size` is P, `matmat` maps M [P, k] to C M [P, k]."""

    @property
    def size(self) -> int: ...

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]: ...


class Spectral(Protocol):
    """A matrix whose eigenvalues a kind of curvature may change: `map_spectrum` returns the matrix with `function`
    applied to its eigenvalues, `is_finite` says whether it holds no NaN and no infinity."""

    def is_finite(self) -> bool: ...

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Any: ...


class FactorInOutputs(Protocol):
    """What operators need of a kind of curvature (1/N) Σ_i J_iᵀ S_i S_iᵀ J_i: `factor` gives S_i for each example,
    `generator` the source of its random draws for one pass over the data."""

    def factor(
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Nested, generator: torch.Generator
    ) -> Factor | Float[Tensor, "N C R"]: ...

    def generator(self) -> torch.Generator: ...


def factor_of(
    curvature: FactorInOutputs, risk: EmpiricalRisk, outputs: Float[Tensor, "N C"], targets: Nested,
    generator: torch.Generator,
) -> Factor:
    """S of some examples of a risk."""
    return as_factor(curvature.factor(risk.loss, outputs, targets, generator))


def pieces(curvature: FactorInOutputs, risk: EmpiricalRisk) -> Iterator[tuple[Nested, Nested]]:
    """The batches of `risk` in order, each in pieces whose factors S hold up to 32 MiB."""
    sizes: dict[Hashable, int] = {}
    for x, y in risk:
        shape = shapes(y)
        if shape not in sizes:
            sizes[shape] = max(1, FACTOR_BYTES // max(1, some_factor(curvature, risk, x, y).bytes_an_example))
        yield from split((x, y), sizes[shape])


def some_factor(curvature: FactorInOutputs, risk: EmpiricalRisk, inputs: Nested, targets: Nested) -> Factor:
    """S of an example that is given twice, for its size: one of a batch of these inputs and targets."""
    outputs, target = repeated((as_matrix(risk.output_like(inputs)), index(targets, slice(1))), 2)
    with torch.no_grad():
        return factor_of(curvature, risk, outputs, target, curvature.generator())


def column_count(curvature: FactorInOutputs, risk: EmpiricalRisk) -> int:
    """The columns of S of all examples, which are as many for each where all targets have one shape."""
    if risk.one_output.ndim <= 2 and not isinstance(risk.batches, tuple):
        x, y = next(iter(risk))
        return risk.examples * some_factor(curvature, risk, x, y).count
    total, counts = 0, dict[Hashable, int]()
    for x, y in risk:
        shape = shapes(y)
        if shape not in counts:
            counts[shape] = some_factor(curvature, risk, x, y).count
        total += examples(y) * counts[shape]
    return total


@dataclass(frozen=True)
class GramOperator:
    """GᵀG for rows G [B, P]."""

    rows: Float[Tensor, "B P"]

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.rows.T @ (self.rows @ matrix)
