"""Products with the exact Hessian, by differentiating the gradient once more in reverse."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.risk import EmpiricalRisk

COLUMNS = 32  # products at once: this bounds the memory


@dataclass(frozen=True)
class HessianOperator:
    """∇²L at the frozen parameters.

    Reverse over reverse, where curvlinops 3.0.1 goes forward over reverse: forward derivatives are missing in torch for
    group norms and attention, and wrong for the affine parameters of a LayerNorm.
    """

    risk: EmpiricalRisk

    @property
    def size(self) -> int:
        return self.risk.space.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """H M, a few columns at a time."""
        total = torch.zeros_like(matrix)
        for x, y in self.risk:
            gradient = summed_gradient_graph(self.risk, x, y)
            if gradient.requires_grad:
                parts = [self._rows(gradient, part.T) for part in matrix.split(COLUMNS, dim=1)]
                total += torch.cat(parts).T
        return total / self.risk.examples

    def _rows(self, gradient: Float[Tensor, "P"], rows: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")  # a loop where vmap has no rule
            parts = torch.autograd.grad(
                gradient, self.risk.parameters, rows.contiguous(),
                retain_graph=True, is_grads_batched=True, allow_unused=True,
            )
        sizes = self.risk.space.sizes
        filled = [rows.new_zeros(len(rows), n) if part is None else part for part, n in zip(parts, sizes)]
        return torch.cat([part.reshape(len(rows), -1) for part in filled], dim=1)


@torch.enable_grad()
def summed_gradient_graph(risk: EmpiricalRisk, x: Tensor, y: Tensor) -> Float[Tensor, "P"]:
    """Σ_i ∇ℓ_i over one batch, which can be differentiated again."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention lack second derivatives
        loss = risk.loss.per_example(risk.outputs(x), y).sum()
    parts = torch.autograd.grad(loss, risk.parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    return risk.space.flatten(list(parts))
