"""Symmetric matrices known by their products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.risk.losses import ExampleLoss


class Operator(Protocol):
    """A symmetric matrix known by its products."""

    @property
    def size(self) -> int: ...

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]: ...


class FactorInOutputs(Protocol):
    """What operators need of a kind of curvature (1/N) Σ_i J_iᵀ S_i S_iᵀ J_i: see `OutputCurvature`."""

    def factor(
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Tensor, generator: torch.Generator
    ) -> Float[Tensor, "N C R"]: ...

    def generator(self) -> torch.Generator: ...


@dataclass(frozen=True)
class WithFallback:
    """An operator, and another for models of whose modules torch lacks the derivatives that the first one takes."""

    first: Operator
    second: Operator

    @property
    def size(self) -> int:
        return self.first.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        try:
            return self.first.matmat(matrix)
        except NotImplementedError:
            return self.second.matmat(matrix)


@dataclass(frozen=True)
class GramOperator:
    """GᵀG for rows G [B, P]."""

    rows: Float[Tensor, "B P"]

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.rows.T @ (self.rows @ matrix)
