"""The penalty as training adds it at every step: strength · q(θ) with its exact gradient, and little else to pay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.options import Fixed, check_number
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.model import QuadraticModel, check_first_order, half, is_one
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures import Structure
from avalanche_curv.core.structures.gradient_pass import GradientPass
from avalanche_curv.core.structures.low_rank_pass import LowRankPass
from avalanche_curv.core.structures.one_pass import OnePass
from avalanche_curv.core.structures.rules import check_pair

FEW = 2**14  # coordinates

Pull = tuple[nn.Parameter, Tensor]
"""A parameter, and what is to be added to the gradient of its first entries along each axis."""


class Penalty:
    """strength · q(θ) of one quadratic model, as a function of a model that can be called at every step.

    Displacements share one piece of memory, since at the size of a model fresh memory costs more than arithmetic. Each
    gradient is handed over to autograd in memory of its own, to which that of the loss is then added in place.

    `strength` may be set at any time. `of` is the quadratic model q, `past` what is evaluated in its place: q around
    its minimum, with the strength in it where that needs no copy. It may be evaluated several times in one step, as
    `torch.optim.LBFGS` does. Give that a line search (`line_search_fn="strong_wolfe"`): without one its steps overflow
    on some losses, with a penalty or without. Raises ValueError for a strength that is negative or not finite.
    """

    of, space, anchors = Fixed[QuadraticModel](), Fixed[ParameterSpace](), Fixed[list[Tensor]]()
    displacement, displacements = Fixed[Tensor](), Fixed[list[Tensor]]()

    @in_own_precision
    def __init__(self, past: QuadraticModel, strength: float) -> None:
        self.of, self._strength = past, math.nan
        self._value: Tensor | float | None = None  # q(θ) at the last evaluation, where it is known
        self._centred = past = _centre(past) or past
        self.strength = strength
        self.space = past.space
        self.anchors = past.space.split(past.anchor)
        self.displacement = torch.empty_like(past.anchor)
        self.displacements = past.space.split(self.displacement)

    @property
    def past(self) -> QuadraticModel:
        return self._scaled

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if strength == self._strength:
            return
        self._strength = check_number("strength", strength, at_least=0)
        if strength == 0 or self._centred.curvature.copies_to_scale:
            self._factor, self._scaled = self._strength, self._centred
        else:
            self._factor, self._scaled = 1.0, self._centred.scaled(self._strength)
        self._one_pass = self._pass()

    def __call__(self, model: nn.Module) -> Tensor:
        """A scalar whose gradient in the parameters of `model` is exactly strength · (g + C δ)."""
        return _Penalty.apply(self, *self.space.tensors(model))

    @in_own_precision
    @torch.no_grad()
    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """strength · (g + C δ) at these parameters θ, in the shape of each of them."""
        found = None if self._one_pass is None else self._one_pass.gradient(parameters)
        if found is not None:
            self._note(found[0])
            return found[1]
        self.move(parameters)
        products = self.past.curvature.products(self.displacement, self.space)
        if self.past.gradient is not None:
            products = [g.add_(slope) for g, slope in zip(products, self.space.split(self.past.gradient))]
        return products if self._factor == 1 else [g.mul_(self._factor) for g in products]

    def add(self, named: Mapping[str, nn.Parameter], own: Mapping[str, nn.Parameter]) -> list[Tensor] | None:
        """Adds strength · ∇q(θ) to the gradients of `own`, which are some of the parameters θ, `named`; a missing
        gradient counts as zero. Returns what `gradients` would; None where one pass over memory was enough
        (`OnePass`)."""
        form = None if self._one_pass is None else self._one_pass.add([own.get(name) for name in self.space.names])
        if form is not None:
            self._note(form)
            return None
        gradients = self.gradients(self.space.cut(named))
        add_to_gradients([(own[n], g) for n, g in zip(self.space.names, gradients) if n in own], None)
        return gradients

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor]) -> None:
        """Takes note of the parameters θ, for `last`."""
        self._value = None
        for parameter, anchor, displacement in zip(parameters, self.anchors, self.displacements):
            torch.sub(parameter, anchor, out=displacement)

    @in_own_precision
    @torch.no_grad()
    def last(self, gradients: Sequence[Tensor] | None = None) -> Tensor:
        """q(θ), without strength, at the parameters of the last call of `gradients`, `add` or `move`: from what that
        call returned, as long as it is unchanged; without that it may take one more product with C."""
        centred = self._centred
        if self._value is None and gradients is not None and self._strength > 0:
            forms = [d.reshape(-1) @ g.reshape(-1) for d, g in zip(self.displacements, gradients)]
            form = torch.stack(forms).sum() / self._strength  # (g + C δ)ᵀ δ
            if centred.gradient is not None:
                form = form + centred.gradient @ self.displacement
            self._value = half(form) + centred.constant
        elif self._value is None:
            self._value = centred.increase(self.displacement) + centred.constant
        return self._value if isinstance(self._value, Tensor) else centred.anchor.new_tensor(self._value)

    def weighted(self, gradients: Sequence[Tensor] | None = None) -> Tensor | float:
        """strength times what `last` returns; a number where one pass over memory found it."""
        value = self._value
        return self._strength * (value if isinstance(value, float) else self.last(gradients))

    def _pass(self) -> GradientPass | None:
        return _in_one_pass(self._scaled) if self._factor == 1 and self._strength > 0 else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make the pass over memory again, in memory of their own."""
        return {**self.__dict__, "_one_pass": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._one_pass = self._pass()

    def _note(self, form: float | Tensor) -> None:
        """Keeps q(θ), which one pass found beside the gradient, from strength · δᵀCδ."""
        self._value = (half(form) + self.past.constant) / self._strength


@torch.no_grad()
def add_to_gradients(pulls: list[Pull], scale: Tensor | None) -> None:
    """p.grad += scale · pull for each parameter p, in its dtype; a missing gradient counts as zero, and a sparse one
    becomes dense."""
    gradients, added = [], []
    for parameter, pull in pulls:
        pull = (pull if scale is None else pull * scale.to(pull.device)).to(parameter.dtype)
        if parameter.grad is None and parameter.shape == pull.shape:
            parameter.grad = pull
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.layout != torch.strided:
            parameter.grad = parameter.grad.to_dense()
        whole = parameter.shape == pull.shape
        gradients.append(parameter.grad if whole else parameter.grad[tuple(map(slice, pull.shape))])
        added.append(pull)
    if gradients:
        torch._foreach_add_(gradients, added)


def check_takes_dense_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raises TypeError for SparseAdam, which refuses the gradients that a penalty makes dense."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam steps sparse gradients alone, and with the penalty of the past every gradient is dense: from "
            "the second experience on it would fail. Use SGD, which takes both, or Adam with Embedding(sparse=False)."
        )


def check_bounded(curvature: Curvature, structure: Structure) -> None:
    """Warns of a curvature with which a penalty may have no lower bound. Raises what `check_pair` raises."""
    check_pair(curvature, structure)
    if not (curvature.is_semidefinite or curvature.is_mended):
        warnings.warn(
            f"{curvature} may be indefinite, and a penalty with it may reward leaving the anchor without bound. Use "
            "Hessian(psd=Clip()) or Hessian(psd=Absolute()) unless that is what you study; say is_semidefinite = True "
            "of a kind of your own that is not.",
            stacklevel=outside(),
        )


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: Penalty, *parameters: Tensor) -> Tensor:
        ctx.gradients = penalty.gradients(parameters)
        ctx.types = [parameter.dtype for parameter in parameters]
        return penalty.strength * penalty.last(ctx.gradients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        check_first_order()
        if ctx.gradients is None:
            raise RuntimeError(
                "The penalty's gradient was handed over in an earlier backward pass. Evaluate the penalty before each "
                "backward pass, or use QuadraticModel.penalty, which keeps its gradient."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if not is_one(grad_outputs[0]):
            gradients = [part * grad_outputs[0] for part in gradients]
        return None, *(part.to(dtype) for part, dtype in zip(gradients, ctx.types))


def _in_one_pass(past: QuadraticModel) -> GradientPass | None:
    """For a diagonal C, for low rank beside a diagonal, and for Kronecker products."""
    parts = past.curvature.eigenvectors_beside_diagonal()
    if parts is None:
        return past.curvature.gradient_pass(past.anchor, past.gradient)
    (values, vectors), diagonal = parts
    if len(values):
        return LowRankPass(past.anchor, vectors, values, diagonal, past.gradient, past.space.shapes)
    return None if diagonal is None else OnePass(past.anchor, diagonal, past.space.shapes, past.gradient)


def _centre(past: QuadraticModel) -> QuadraticModel | None:
    """A quadratic model written around its minimum, where its linear term is zero; None where that costs more than a
    product, and where a flat direction has a slope."""
    if past.gradient is None:
        return past
    diagonal = _diagonal(past)
    if diagonal is None:
        return None
    farthest = 2 * past.anchor.abs().max()
    for some in (slice(FEW), slice(None)):  # a few tell of most minima that are too far
        slope, curvature = past.gradient[some], diagonal[some]
        flat = curvature <= 0
        step = torch.where(flat, 0.0, -slope / curvature)
        if step.abs().max() > farthest or (flat & (slope != 0)).any():
            return None  # so far away that the value would cancel: no sum of quadratics, whose minimum is among anchors
    return replace(past.reanchored(past.anchor + step), gradient=None)  # C (a* − a) + g is zero but for rounding


def _diagonal(past: QuadraticModel) -> Tensor | None:
    """The diagonal of a diagonal C; None for any other."""
    parts = past.curvature.eigenvectors_beside_diagonal()
    return None if parts is None or len(parts[0][0]) else parts[1]
