"""A quadratic model of every single stored example, in the structures that restrict it: the κ of the research log."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import hessian, vmap

from avalanche_curv import BatchedEmpiricalFisher, Curvature, EmpiricalRisk, Hessian, OutputCurvature
from avalanche_curv.core.quadratic.model import half


@dataclass(frozen=True)
class Derivatives:
    """Of N units (examples, or batches of them) at one point: losses, gradients, and curvature as rows or whole."""

    anchor: Float[Tensor, "P"]
    sizes: tuple[int, ...]
    losses: Float[Tensor, "N"]
    gradients: Float[Tensor, "N P"]
    rows: Float[Tensor, "N R P"] | None
    matrices: Float[Tensor, "N P P"] | None

    def increase(self, structure: str, displacement: Float[Tensor, "P"]) -> Float[Tensor, "N"]:
        """½ δᵀ C_x δ of each unit, C_x restricted to the structure: all of it, its top eigenpairs, blocks of
        parameters, the diagonal. Rows are fewer than the eigenpairs kept, so that these are all."""
        if structure == "diagonal":
            return half(self._diagonal @ displacement.square())
        blocks = self._blocks() if structure == "block" else [slice(None)]
        return sum((self._form(displacement, block) for block in blocks), torch.zeros_like(self.losses))

    def _form(self, vector: Float[Tensor, "P"], block: slice) -> Float[Tensor, "N"]:
        part = vector[block]
        if self.rows is not None:
            return half((self.rows[..., block] @ part).square().sum(1))
        return half((self._whole()[:, block, block] @ part) @ part)

    def _whole(self) -> Float[Tensor, "N P P"]:
        if self.matrices is None:
            raise ValueError("Derivatives hold rows or matrices; got neither. Give one of them.")
        return self.matrices

    @cached_property
    def _diagonal(self) -> Float[Tensor, "N P"]:
        return self._whole().diagonal(dim1=1, dim2=2) if self.rows is None else self.rows.square().sum(1)

    def _blocks(self) -> list[slice]:
        """The coordinates of each parameter tensor."""
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes)]


def derivatives(curvature: Curvature, risk: EmpiricalRisk) -> Derivatives:
    """The derivatives of the stored examples where the risk is frozen; for a squared batch gradient, of batches."""
    losses = losses_at(unit_of(curvature), risk, risk.anchor)
    gradients = torch.stack([risk.summed_gradient(x, y) / len(y) for x, y in risk.rebatched(unit_of(curvature))])
    rows = matrices = None
    if isinstance(curvature, BatchedEmpiricalFisher):
        rows = gradients[:, None]
    elif isinstance(curvature, OutputCurvature):
        rows = torch.cat(list(curvature.rows(risk))).unflatten(0, (risk.examples, -1)) * risk.examples**0.5
    elif isinstance(curvature, Hessian):
        matrices = _hessians(risk)
    return Derivatives(risk.anchor, risk.space.sizes, losses, gradients, rows, matrices)


def has_kappa(curvature: Curvature, structure: str) -> bool:
    """Whether κ is measured: not of the top eigenpairs of single examples' Hessians, which are of full rank."""
    return not (structure == "low rank" and isinstance(curvature, Hessian))


def losses_at(unit: int, risk: EmpiricalRisk, parameters: Float[Tensor, "P"]) -> Float[Tensor, "N"]:
    """The mean loss of each unit of so many examples at any parameters."""
    x, y = next(iter(risk))
    with torch.no_grad():
        losses = risk.loss.per_example(risk.outputs_at(risk.space.split(parameters), x), y)
    return torch.stack([part.mean() for part in losses.split(unit)])


def unit_of(curvature: Curvature) -> int:
    """How many examples share a quadratic model: the batch of a squared batch gradient, else one."""
    return curvature.batch_size if isinstance(curvature, BatchedEmpiricalFisher) else 1


def _hessians(risk: EmpiricalRisk) -> Float[Tensor, "N P P"]:
    x, y = next(iter(risk))

    def loss(parameters: Tensor, one_x: Tensor, one_y: Tensor) -> Tensor:
        outputs = risk.outputs_at(risk.space.split(parameters), one_x[None])
        return risk.loss.per_example(outputs, one_y[None])[0]

    return vmap(hessian(loss), in_dims=(None, 0, 0))(risk.anchor, x, y)
