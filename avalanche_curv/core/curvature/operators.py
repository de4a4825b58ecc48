"""Symmetric matrices known by their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.risk.losses import ExampleLoss


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


@dataclass(frozen=True)
class GramOperator:
    """GᵀG for rows G [B, P]."""

    rows: Float[Tensor, "B P"]

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.rows.T @ (self.rows @ matrix)
