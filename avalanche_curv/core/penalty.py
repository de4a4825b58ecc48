"""The penalty as training adds it at every step: strength · q(θ) with its exact gradient, and little else to pay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.quadratic import QuadraticModel, check_first_order, half
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
        return self.strength * self.past.penalty(model)


class DiagonalPenalty(Penalty):
    """For a diagonal C around its minimum, in memory that is used again at every step.

    At the size of a model, fresh memory costs more than the arithmetic.
    """

    def __init__(self, past: QuadraticModel, strength: float) -> None:
        self.space, self.constant = past.space, strength * past.constant
        self.values = strength * past.curvature.tensors()[0]
        self.anchors = past.space.split(past.anchor)
        self.displacement, self.gradient = torch.empty_like(past.anchor), torch.empty_like(past.anchor)
        self.displacements, self.gradients = past.space.split(self.displacement), past.space.split(self.gradient)
        self.calls = 0

    def __call__(self, model: nn.Module) -> Tensor:
        return _DiagonalPenalty.apply(self, *self.space.tensors(model))

    def evaluate(self, parameters: Sequence[Tensor]) -> Tensor:
        """strength · q(θ), with strength · C δ left in `gradients`."""
        for parameter, anchor, displacement in zip(parameters, self.anchors, self.displacements):
            torch.sub(parameter, anchor, out=displacement)
        torch.mul(self.values, self.displacement, out=self.gradient)
        return half(self.displacement @ self.gradient) + self.constant


class _DiagonalPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: DiagonalPenalty, *parameters: Tensor) -> Tensor:
        penalty.calls += 1
        ctx.penalty, ctx.call, ctx.types = penalty, penalty.calls, [p.dtype for p in parameters]
        return penalty.evaluate(parameters)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order()
        penalty = ctx.penalty
        if ctx.call != penalty.calls:
            raise RuntimeError(
                "The penalty was evaluated again before the backward pass of an earlier evaluation. "
                "Call backward after each evaluation, or use QuadraticModel.penalty, which keeps each gradient."
            )
        (scale,) = grad_outputs
        gradients = penalty.gradients
        if scale.device.type != "cpu" or scale.item() != 1:
            gradients = [gradient * scale for gradient in gradients]
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.types))


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
