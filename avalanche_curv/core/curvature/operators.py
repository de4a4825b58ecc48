"""Symmetric matrices known by their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk, as_matrix
from avalanche_curv.core.risk.losses import ExampleLoss
from avalanche_curv.core.risk.nested import Nested, split

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
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Tensor, generator: torch.Generator
    ) -> Float[Tensor, "N C R"]: ...

    def generator(self) -> torch.Generator: ...


def pieces(curvature: FactorInOutputs, risk: EmpiricalRisk) -> Iterator[tuple[Nested, Tensor]]:
    """The batches of `risk` in order, each in pieces whose factors S [n, C, R] take up to 32 MiB."""
    size = 0
    for x, y in risk:
        size = size or max(1, FACTOR_BYTES // max(1, factor_bytes(curvature, risk, y)))
        yield from zip(split(x, size), y.split(size))


def factor_bytes(curvature: FactorInOutputs, risk: EmpiricalRisk, targets: Tensor) -> int:
    """The memory of S of each example; 0 where all share one."""
    factor = some_factor(curvature, risk, targets)
    return factor.stride(0) * factor.element_size()


def some_factor(curvature: FactorInOutputs, risk: EmpiricalRisk, targets: Tensor) -> Float[Tensor, "2 C R"]:
    """S of an example that is given twice, for its shape; `targets` are those of a batch."""
    outputs, target = as_matrix(risk.one_output), targets[:1]
    with torch.no_grad():
        return curvature.factor(
            risk.loss, outputs.expand(2, -1), target.expand(2, *target.shape[1:]), curvature.generator()
        )


@dataclass(frozen=True)
class GramOperator:
    """GᵀG for rows G [B, P]."""

    rows: Float[Tensor, "B P"]

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.rows.T @ (self.rows @ matrix)
