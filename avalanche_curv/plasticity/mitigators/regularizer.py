"""Regularisers, mitigators that add the gradient of a penalty to that of the loss, and what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.attachment import check_minimises, skips_step
from avalanche_curv.core.options import Setting, check_count, check_kind, check_number
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.base import Mitigator


class Regularizer(Mitigator):
    """Adds strength · R(θ) to what training minimises, as gradients in closed form just before each step.

    Like torch's weight decay it leaves parameters without a gradient alone, such as those of a head that is not in
    use. `strength` 0 changes nothing. With `every=n` the gradient is added at every n-th step and n times as large, so
    that the strength means the same. `include` and `exclude` select parameters as for every `Mitigator`.

    Raises ValueError for a negative strength, for `every` below 1, and, when attached, for an optimiser with
    `maximize=True`, which would maximise R too. A new regulariser defines `penalty` and `add_penalty_gradient`.
    """

    strength = Setting(partial(check_number, at_least=0))
    every = Setting(partial(check_count, hint="1 regularises each step."))

    def __init__(
        self,
        strength: float,
        *,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.strength, self.every = strength, every

    @abstractmethod
    def penalty(self, model: nn.Module) -> Tensor:
        """R(θ), without strength and in autograd's graph, for loops that add strength · R to their loss."""

    @abstractmethod
    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        """Adds weight · ∇R to the gradients of `parameters`, a selection by name of those of `model`; one that has no
        gradient gets one."""

    @torch.no_grad()
    def add_gradients(self, model: nn.Module) -> None:
        """Adds strength · ∇R to the gradients of all selected parameters now, for loops without `attach`."""
        if self.strength:
            self.add_penalty_gradient(self.parameters(model), model, self.strength)

    @torch.no_grad()
    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.strength == 0 or self.steps % self.every or skips_step(optimizer):
            return
        check_minimises(self, optimizer)
        parameters = {n: p for n, p in self.parameters(model, optimizer).items() if p.grad is not None}
        with _unscaled(optimizer, [p.grad for p in parameters.values() if p.grad is not None]):
            if parameters:
                self.add_penalty_gradient(parameters, model, self.strength * self.every)

    def _check(self, optimizer: Optimizer, model: nn.Module) -> None:
        super()._check(optimizer, model)
        check_minimises(self, optimizer)


@contextmanager
def _unscaled(optimizer: Optimizer, gradients: Sequence[Tensor]) -> Iterator[None]:
    """Removes, within the context, the scale from gradients that a fused optimiser removes in its step. Afterwards they
    are as before, without loss in half precision, plus what was added meanwhile, scaled."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        yield
        return
    scaled = [gradient.clone() for gradient in gradients]
    for gradient in gradients:
        gradient.div_(scale.to(gradient.device))
    unscaled = [gradient.clone() for gradient in gradients]
    try:
        yield
    finally:
        for gradient, before, then in zip(gradients, scaled, unscaled):
            added = at_least_float32(gradient) - at_least_float32(then)
            gradient.copy_(at_least_float32(before) + added * scale.to(gradient.device))


def add_to_gradients(parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], weight: float) -> None:
    """p.grad += weight · direction for each parameter p; a missing gradient counts as zero."""
    add_scaled([gradient_of(parameter) for parameter in parameters], directions, weight)


def add_scaled(gradients: Sequence[Tensor], directions: Sequence[Tensor], weight: float) -> None:
    """gradient += weight · direction for each gradient, in its dtype."""
    if gradients:
        added = [direction.to(gradient.dtype) for gradient, direction in zip(gradients, directions)]
        torch._foreach_add_([*gradients], added, alpha=weight)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient of `parameter`, to be changed in place; a missing one becomes zeros. Raises TypeError if it is
    sparse."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout != torch.strided:
        raise TypeError(
            f"The gradient of a parameter of shape {tuple(parameter.shape)} is sparse, and a regulariser changes every "
            "entry. Leave the parameter out, as by exclude=(nn.Embedding,), or make its module with sparse=False."
        )
    return parameter.grad


def differences(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> list[Tensor]:
    """p − o for each parameter p and its partner o in `others`, detached."""
    values = [parameter.detach() for parameter in parameters]
    return [*torch._foreach_sub(values, [*others])] if values else []


def at_least_float32(values: Tensor) -> Tensor:
    """`values`, in float32 if they are in half precision, where sums over many entries overflow or round."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ_t ‖t‖² over the tensors; zero without any."""
    return sum_of([at_least_float32(tensor).square().sum() for tensor in tensors])


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, which may lie on several devices; zero without any."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


class InitialValues:
    """The initial parameters θ0 by canonical name: the value of each entry when it was first seen.

    Where a parameter has grown, its former entries keep their initial values and new ones start with their present
    value. A parameter that is smaller than before, or has other axes, is a new one.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Stores the values of parameters, and of entries of grown parameters, that were not seen before."""
        for name, parameter in parameters.items():
            known = self.values.get(name)
            if known is None or known.shape != parameter.shape:
                self.values[name] = extended(known, parameter.detach())

    def of(self, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """The initial value of each parameter, on its device and in its dtype."""
        self.remember(parameters)
        for name, parameter in parameters.items():
            self.values[name] = self.values[name].to(parameter)
        return [self.values[name] for name in parameters]


def extended(known: Tensor | None, like: Tensor) -> Tensor:
    """A copy of `like` whose first entries along each axis are those of `known`, if `known` is given and fits into it.

    >>> import torch
    >>> extended(torch.tensor([1.0, 2.0]), torch.zeros(3))
    tensor([1., 2., 0.])
    """
    result = like.clone()
    if known is not None and known.ndim == like.ndim and all(old <= new for old, new in zip(known.shape, like.shape)):
        result[tuple(slice(0, n) for n in known.shape)] = known.to(like)
    return result


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor, by name."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


initial_values = partial(check_kind, kind=InitialValues, example="InitialValues()")
"""A check for an attribute that holds initial parameters."""

by_name = partial(check_kind, kind=dict, example="{}")
"""A check for an attribute that holds values by the names of parameters."""
