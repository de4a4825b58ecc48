"""The penalty as training adds it at every step: strength · q(θ) with its exact gradient, and little else to pay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.quadratic import QuadraticModel, check_first_order, half, times
from avalanche_curv.core.structures.diagonal import DiagonalMatrix


class Penalty(ABC):
    """strength · q(θ) of one quadratic model, as a function of a model that can be called at every step."""

    @abstractmethod
    def __call__(self, model: nn.Module) -> Tensor:
        """A scalar whose gradient in the parameters of `model` is exactly strength · (g + C δ)."""


def penalty_of(past: QuadraticModel, strength: float) -> Penalty:
    """The fastest penalty for the structure of a quadratic model."""
    centre = _centre(past)
    return GeneralPenalty(past, strength) if centre is None else DiagonalPenalty(centre, strength)


class GeneralPenalty(Penalty):
    """Through the product of any structure."""

    def __init__(self, past: QuadraticModel, strength: float) -> None:
        self.past, self.strength = past, strength

    def __call__(self, model: nn.Module) -> Tensor:
        return self.past.penalty(model, self.strength)


class DiagonalPenalty(Penalty):
    """For a diagonal C around its minimum.

    Each gradient is handed over to autograd in memory of its own, to which the gradient of the loss is then added in
    place. Displacements share one piece of memory: at the size of a model, fresh memory costs more than arithmetic.
    """

    def __init__(self, past: QuadraticModel, strength: float) -> None:
        self.space, self.constant = past.space, strength * past.constant
        self.values = past.space.split(strength * past.curvature.tensors()[0])
        self.anchors = past.space.split(past.anchor)
        self.scratch = past.anchor.new_empty(max(anchor.numel() for anchor in self.anchors))

    def __call__(self, model: nn.Module) -> Tensor:
        return _DiagonalPenalty.apply(self, *self.space.tensors(model))

    def evaluate(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """strength · q(θ), and strength · C δ for each parameter."""
        gradients, products = [], []
        for parameter, anchor, values in zip(parameters, self.anchors, self.values):
            displacement = self.scratch[: anchor.numel()]
            torch.sub(parameter, anchor, out=displacement.view_as(anchor))
            gradient = values * displacement.view_as(anchor)
            products.append(displacement @ gradient.view(-1))
            gradients.append(gradient)
        return half(torch.stack(products).sum()) + self.constant, gradients


class _DiagonalPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: DiagonalPenalty, *parameters: Tensor) -> Tensor:
        value, ctx.gradients = penalty.evaluate(parameters)
        ctx.types = [parameter.dtype for parameter in parameters]
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order()
        if ctx.gradients is None:
            raise RuntimeError(
                "The penalty's gradient was handed over in an earlier backward pass. Evaluate the penalty before each "
                "backward pass, or use QuadraticModel.penalty, which keeps its gradient."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(times(part, grad_outputs[0]).to(dtype) for part, dtype in zip(gradients, ctx.types))


def _centre(past: QuadraticModel) -> QuadraticModel | None:
    """The same function around its minimum, where its linear term is zero; None where C is no diagonal or has none."""
    if not isinstance(past.curvature, DiagonalMatrix):
        return None
    if past.gradient is None:
        return past
    values = past.curvature.values
    if ((values <= 0) & (past.gradient != 0)).any():
        return None
    step = torch.where(values > 0, past.gradient / values, torch.zeros_like(values))
    if step.abs().max() > 2 * past.anchor.abs().max():
        return None  # so far away that the value would cancel: no sum of quadratics, whose minimum is among anchors
    anchor = past.anchor - step
    return replace(past.reanchored(anchor), gradient=None)  # C (a* − a) + g is zero but for rounding
