"""The generalised Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_curv.core.curvature.base import OutputCurvature
from avalanche_curv.core.losses import ExampleLoss, Factor
from avalanche_curv.core.nested import Nested


@dataclass(frozen=True)
class GGN(OutputCurvature):
    """The generalised Gauss-Newton matrix (1/N) Σ_i J_iᵀ (∇²_f ℓ_i) J_i (Schraudolph 2002).

    It equals the `Fisher` for cross-entropy and squared error. On a network of linear and piecewise linear layers its
    diagonal is also that of the `Hessian`, since each output is piecewise linear in any single weight.
    """

    def factor(
        self, loss: ExampleLoss, outputs: Tensor, targets: Nested, generator: torch.Generator
    ) -> Factor | Tensor:
        return loss.hessian_factor(outputs, targets)
