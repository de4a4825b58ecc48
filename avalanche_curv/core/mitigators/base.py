"""What keeps a network able to learn, in any training loop: work around an optimiser's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.mitigators.selection import Kept, Selection
from avalanche_curv.core.options import is_count, is_number
from avalanche_curv.core.parameters import canonical_name


class Mitigator(ABC):  # noqa: B024  nothing is common to all of them but the hooks
    """Mitigates the loss of plasticity of one model, by what it does before or after each step of an optimiser.

    It is made without a model, and given it at each use, so that it survives layers that grow or are replaced: its
    state goes by canonical parameter names. One mitigator serves one model; give each network one of its own.
    `include` and `exclude` choose parameters by name ("head", "*.bias") or by type of module (nn.LayerNorm); frozen
    ones, and those that the optimiser does not step, are never touched.
    """

    def __init__(self, *, include: Iterable[Kept] = (), exclude: Iterable[Kept] = ()) -> None:
        if isinstance(include, str) or isinstance(exclude, str):
            raise TypeError("include and exclude each take a list of names and types of modules; got a single name.")
        self.selection = Selection(tuple(include), tuple(exclude))
        self.steps = 0  # of the optimiser, so far

    def attach(self, optimizer: Optimizer, model: nn.Module) -> Attachment:
        """Work at each `optimizer.step()` from now on, until the result's `remove()`; also a context manager.

        Gradients are unscaled there (`torch.amp.GradScaler` does it before the step), and clipped already where the
        loop clips them: what a mitigator adds is not clipped. Raises TypeError for an optimiser that evaluates a
        closure, such as LBFGS: add `strength * penalty(model)` to its loss instead.
        """
        self.prepare(model)

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(callable(value) for value in (*args, *kwargs.values())):
                raise TypeError(
                    f"{type(self).__name__} cannot follow a step with a closure, which makes gradients anew. Call "
                    "step() without one, or add the penalty to the loss inside of it."
                )
            self.before_step(model, optimizer)

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.after_step(model, optimizer)

        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"{type(self).__name__} cannot follow LBFGS, which makes gradients anew inside its step. Add the "
                "penalty to the loss in its closure, or use another optimiser."
            )
        hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        return Attachment(self, hooks)

    def prepare(self, model: nn.Module) -> None:
        """Look at the model before training, and again after it has grown. Raises where the options do not fit it."""
        self.selection.check(model)

    def release(self) -> None:  # noqa: B027
        """Let go of the model that `prepare` saw."""

    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:  # noqa: B027  most do one of the two
        """Between the backward pass and the step."""

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After the step. Counts it."""
        self.steps += 1

    def after_task(self, model: nn.Module, optimizer: Optimizer) -> None:  # noqa: B027
        """At the end of a task, for loops that know it."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept for a resumed run to be the same."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.steps = state["steps"]

    def parameters(self, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, nn.Parameter]:
        """The parameters to work on by canonical name, each once: trainable, selected and stepped by `optimizer`."""
        stepped = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {
            canonical_name(name): parameter
            for name, parameter in self.selection.of(model)
            if parameter.requires_grad and (stepped is None or id(parameter) in stepped)
        }


class Regularizer(Mitigator):
    """Adds strength · R(θ) to what training minimises, as gradients in closed form just before each step.

    `strength` 0 changes nothing. With `every=n` the gradient comes at every n-th step and n times as large, so that
    the strength means the same.
    """

    def __init__(
        self, strength: float, *, every: int = 1, include: Iterable[Kept] = (), exclude: Iterable[Kept] = ()
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
    def _add(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float | Tensor) -> None:
        """Add weight · ∇R to the gradients of some of the model's parameters; those that have none get one."""

    @torch.no_grad()
    def add_gradients(self, model: nn.Module) -> None:
        """Add strength · ∇R to the gradients of all selected parameters now, in closed form."""
        if self.strength:
            self._add(self.parameters(model), model, self.strength)

    @torch.no_grad()
    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.strength == 0 or self.steps % self.every:
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimiser unscales gradients within its step
        weight = self.strength * self.every * (1.0 if scale is None else scale)
        self._add(self.parameters(model, optimizer), model, weight)


@dataclass(frozen=True)
class Attachment:
    """A mitigator and its hooks in an optimiser."""

    mitigator: Mitigator
    hooks: tuple[Any, ...]

    def remove(self) -> None:
        """Work no more."""
        for hook in self.hooks:
            hook.remove()
        self.mitigator.release()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()
