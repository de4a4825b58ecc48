"""The curvature that a variational Gaussian has around the anchor, as the optimiser IVON estimates it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core import Curvature, Diagonal, EmpiricalRisk, Operator
from avalanche_curv.core.nested import examples
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.rules import rule


@dataclass(frozen=True)
class Variational(Curvature):
    """h with h_i = E[∂²L/∂θ_i²] under q = N(a, σ²), σ_i² = 1 / (N (h_i + δ)): the diagonal of the Hessian in the mean
    over the Gaussian whose precision it makes, N (h + δ), with the anchor as its mean and δ the damping.

    After so many steps of IVON with its mean held still (Shen et al. 2024, arXiv 2402.17641, algorithm 1): of a
    mini-batch gradient ĝ at a + ε, ε ~ N(0, σ²), ĥ = ĝ ε / σ² estimates h (Price), and
    h ← β h + (1 − β) ĥ + ½ (1 − β)² (h − ĥ)² / (h + δ), which keeps h + δ positive; what is below 0 at the
    end is 0. Draws are those of `seed`.
    """

    damping: float = 0.1
    decay: float = 0.98
    steps: int = 200
    initial: float = 1e-3
    batch: int = 100
    seed: int = 0

    is_semidefinite = True

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return _Diagonal(self.values(risk))

    def values(self, risk: EmpiricalRisk) -> Float[Tensor, "P"]:
        """h."""
        generator = torch.Generator().manual_seed(self.seed)
        batches = list(risk.rebatched(self.batch))
        h = torch.full_like(risk.anchor, self.initial)
        order: list[int] = []
        for _ in range(self.steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            x, y = batches[order.pop()]
            precision = risk.examples * (h + self.damping)
            noise = torch.randn(h.shape, generator=generator, dtype=h.dtype) * precision.rsqrt()
            with risk.holding(risk.space.split(risk.anchor + noise)):
                slope = risk.summed_gradient(x, y) / examples(y)
            found = slope * noise * precision
            h = self.decay * h + (1 - self.decay) * found + (
                0.5 * (1 - self.decay) ** 2 * (h - found).square() / (h + self.damping)
            )  # fmt: skip
        return h.clamp_min(0)


@dataclass(frozen=True)
class _Diagonal:
    values: Float[Tensor, "P"]

    @property
    def size(self) -> int:
        return len(self.values)

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.values[:, None] * matrix


@rule(Variational, Diagonal)
def diagonal_of_variational(curvature: Variational, structure: Diagonal, risk: EmpiricalRisk) -> DiagonalMatrix:
    """h itself."""
    return DiagonalMatrix(curvature.values(risk))
