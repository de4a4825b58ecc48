"""Products with the curvature of a risk, through graphs that are kept or made anew."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.curvature.operators import FactorInOutputs, pieces
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk


class _OfRisk:
    """What every operator on a risk says of itself."""

    risk: EmpiricalRisk

    @property
    def size(self) -> int:
        return self.risk.space.size

    @property
    def nbytes(self) -> int:
        """The frozen model and the examples."""
        data = sum(t.nbytes for batch in self.risk.batches for t in batch)
        return data + sum(p.nbytes for p in self.risk.base.parameters())


@dataclass(frozen=True)
class Linearised(_OfRisk):
    """(1/N) Σ_i J_iᵀ S_i S_iᵀ J_i from the graphs of f and of w ↦ Jᵀw, whose derivative in w is J.

    Products with J need no forward-mode derivatives, which torch lacks for many modules.
    """

    curvature: FactorInOutputs
    risk: EmpiricalRisk

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, column by column."""
        total = torch.zeros_like(matrix)
        for batch in self._batches:
            total += batch.matmat(matrix)
        return total / self.risk.examples

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not stored: they are computed again."""
        return {"curvature": self.curvature, "risk": self.risk}

    @cached_property
    def _batches(self) -> list[_Batch]:
        generator = self.curvature.generator()
        return [_Batch(self.curvature, self.risk, x, y, generator) for x, y in self.risk]


@dataclass(frozen=True)
class Relinearised(_OfRisk):
    """(1/N) Σ_i J_iᵀ S_i S_iᵀ J_i with graphs made anew for each product, one batch at a time."""

    curvature: FactorInOutputs
    risk: EmpiricalRisk

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, column by column."""
        generator, total = self.curvature.generator(), torch.zeros_like(matrix)
        for x, y in pieces(self.curvature, self.risk):
            total += _Batch(self.curvature, self.risk, x, y, generator).matmat(matrix)
        return total / self.risk.examples


class _Batch:
    """One batch, ready for products."""

    @torch.enable_grad()
    def __init__(
        self, curvature: FactorInOutputs, risk: EmpiricalRisk, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> None:
        self.space, self.parameters = risk.space, risk.parameters
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention lack second derivatives
            self.outputs = risk.outputs(x)
        values = self.outputs.detach()
        self.factor = curvature.factor(risk.loss, values, y, generator)
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
        curved = torch.einsum("ncr,nr->nc", self.factor, torch.einsum("ncr,nc->nr", self.factor, change))
        parts = torch.autograd.grad(
            self.outputs, self.parameters, curved, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(parts)


@dataclass(frozen=True)
class LinearisedHessian(_OfRisk):
    """∇²L from the graph of the gradient."""

    risk: EmpiricalRisk

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """H M, column by column."""
        return torch.stack([self._product(column) for column in matrix.T], dim=1) / self.risk.examples

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not stored: they are computed again."""
        return {"risk": self.risk}

    def _product(self, vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        total = torch.zeros_like(vector)
        for gradient in self._gradients:
            if gradient.requires_grad:
                parts = torch.autograd.grad(
                    gradient, self.risk.parameters, vector,
                    retain_graph=True, allow_unused=True, materialize_grads=True,
                )
                total += self.risk.space.flatten(list(parts))
        return total

    @cached_property
    def _gradients(self) -> list[Tensor]:
        return [summed_gradient_graph(self.risk, x, y) for x, y in self.risk]


COLUMNS = 32  # products at once: this bounds the memory


@dataclass(frozen=True)
class HessianOperator:
    """∇²L at the frozen parameters.

    Reverse over reverse, where curvlinops 3.0.1 goes forward over reverse: forward derivatives are missing in torch for
    group norms and attention, and wrong for the affine parameters of a LayerNorm. Where they are right, its products
    took 0.9 to 3.2 times as long (multilayer perceptrons of 900 and 90,000 parameters, a small convolutional network).
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
