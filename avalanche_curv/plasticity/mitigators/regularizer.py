"""What adds a penalty to the loss, by its gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.options import is_count, is_number
from avalanche_curv.plasticity.mitigators.base import Mitigator, skips
from avalanche_curv.plasticity.mitigators.gradients import in_full
from avalanche_curv.plasticity.mitigators.selection import ParameterSelector


class Regularizer(Mitigator):
    """Adds strength · R(θ) to what training minimises, as gradients in closed form just before each step.

    Like torch's weight decay it leaves parameters without a gradient alone, such as those of a head that is not in
    use. `strength` 0 changes nothing. With `every=n` the gradient comes at every n-th step and n times as large, so
    that the strength means the same. Raises ValueError for an optimiser with `maximize=True`, which would maximise R
    too.
    """

    def __init__(
        self,
        strength: float,
        *,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        if not is_number(strength) or strength < 0:
            raise ValueError(f"strength must be a finite number, at least 0; got {strength!r}.")
        if not is_count(every):
            raise ValueError(f"every must be at least 1 step; got {every!r}. 1 regularises each step.")
        self.strength, self.every = float(strength), every

    @abstractmethod
    def penalty(self, model: nn.Module) -> Tensor:
        """R(θ), without strength, in autograd's graph: for loops that add it to their loss."""

    @abstractmethod
    def _add(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        """Add weight · ∇R to the gradients of some of the model's parameters; those that have none get one."""

    @torch.no_grad()
    def add_gradients(self, model: nn.Module) -> None:
        """Add strength · ∇R to the gradients of all selected parameters now, in closed form."""
        if self.strength:
            self._add(self.parameters(model), model, self.strength)

    @torch.no_grad()
    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.strength == 0 or self.steps % self.every or skips(optimizer):
            return
        self._check_direction(optimizer)
        parameters = {n: p for n, p in self.parameters(model, optimizer).items() if p.grad is not None}
        with _unscaled(optimizer, [p.grad for p in parameters.values() if p.grad is not None]):
            if parameters:
                self._add(parameters, model, self.strength * self.every)

    def _check(self, optimizer: Optimizer, model: nn.Module) -> None:
        super()._check(optimizer, model)
        self._check_direction(optimizer)

    def _check_direction(self, optimizer: Optimizer) -> None:
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                f"{type(self).__name__} minimises its penalty, but the optimiser maximises. Minimise the negative loss."
            )


@contextmanager
def _unscaled(optimizer: Optimizer, gradients: Sequence[Tensor]) -> Iterator[None]:
    """Gradients without the scale that a fused optimiser takes off within its step; what is added to them meanwhile is
    scaled as they are. They themselves lose nothing, whatever half precision makes of them meanwhile."""
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
            added = in_full(gradient) - in_full(then)
            gradient.copy_(in_full(before) + added * scale.to(gradient.device))
