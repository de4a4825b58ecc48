"""What keeps a network able to learn, in any training loop: work around an optimiser's step."""

from __future__ import annotations

import weakref
from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from avalanche_curv.core.risk.parameters import canonical_name
from avalanche_curv.plasticity.mitigators.selection import ParameterSelector, Selection, listed


class Mitigator(ABC):  # noqa: B024  nothing is common to all of them but the hooks
    """Mitigates the loss of plasticity of one model, by what it does before or after each step of an optimiser.

    It is made without a model, and given it at each use, so that it survives layers that grow or are replaced: its
    state goes by canonical parameter names. One mitigator serves one model and one optimiser; give each network one
    of its own. `include` and `exclude` choose parameters by name ("head", "*.bias") or by type of module
    (nn.LayerNorm); frozen ones, and those that the optimiser does not step, are never touched.
    """

    def __init__(self, *, include: Iterable[ParameterSelector] = (), exclude: Iterable[ParameterSelector] = ()) -> None:
        self.selection = Selection(listed(include), listed(exclude))
        self.steps = 0  # of the optimiser, so far
        self._attached: Attachment | None = None
        self._taken: dict[str, bool] = {}  # whether a name is selected; asked again after `prepare`

    def attach(self, optimizer: Optimizer, model: nn.Module) -> Attachment:
        """Work at each `optimizer.step()` from now on, until the result's `remove()`; also a context manager.

        Gradients are unscaled there (`torch.amp.GradScaler` does it before the step), and clipped already where the
        loop clips them: what a mitigator adds is not clipped. Of a step with a closure, as PyTorch Lightning takes, it
        works after the closure; steps that a scaler has a fused optimiser skip do not count. Attached again for the
        same model, as to a new optimiser for each task, it leaves the old optimiser.

        Raises TypeError for LBFGS, which evaluates closures several times: add `strength * penalty(model)` to the loss
        there. Raises ValueError where the optimiser steps no parameter that is selected, RuntimeError where the
        mitigator is attached for another model.
        """
        self._check(optimizer, model)
        if self._attached is not None:
            self._attached.move_from(model)
        try:
            self.prepare(model)
            if not self.parameters(model, optimizer):
                raise ValueError(
                    f"The {type(optimizer).__name__} steps no trainable parameter of {type(model).__name__} that "
                    f"{type(self).__name__} selects. Give the optimiser of this model."
                )
        except Exception:
            self.release()
            raise
        self._attached = Attachment(self, weakref.ref(model), self._hooks(optimizer, model))
        return self._attached

    def prepare(self, model: nn.Module) -> None:
        """Look at the model before training, and again after it has grown. Raises where the options do not fit it, and
        for parameters that are complex or not initialised yet."""
        self._taken = {}
        self.selection.check(model)
        for name, parameter in self.parameters(model).items():
            if is_lazy(parameter):
                raise ValueError(f"Parameter '{name}' has no shape yet. Pass a batch through the model first.")
            if parameter.is_complex():
                raise TypeError(f"Parameter '{name}' is complex; mitigators know real ones. Exclude or freeze it.")

    def release(self) -> None:  # noqa: B027
        """Let go of the model that `prepare` saw."""

    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:  # noqa: B027  most do one of the two
        """Between the backward pass and the step."""

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """After the step. Counts it."""
        self.steps += 1

    def after_task(self, model: nn.Module, optimizer: Optimizer) -> None:  # noqa: B027
        """Between two tasks, for loops that know them: when the first is evaluated and remembered."""

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
            for name, parameter in self.selection.of(model, self._taken)
            if parameter.requires_grad and (stepped is None or id(parameter) in stepped)
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached to nothing, nor is one that is pickled."""
        return self.__dict__ | {"_attached": None}

    def _check(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Raises for what cannot be attached to."""
        if not isinstance(optimizer, Optimizer) or not isinstance(model, nn.Module):
            given = f"{type(optimizer).__name__}, {type(model).__name__}"
            raise TypeError(f"attach(optimizer, model) takes a torch optimiser and a module; got {given}.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"{type(self).__name__} cannot follow LBFGS, which makes gradients anew inside its step. Add the "
                "penalty to the loss in its closure, or use another optimiser."
            )

    def _hooks(self, optimizer: Optimizer, model: nn.Module) -> tuple[Any, ...]:
        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
            if closure is None:
                self.before_step(model, optimizer)
                return None

            def followed() -> Any:
                loss = closure()
                self.before_step(model, optimizer)
                return loss

            return args[:1], {**kwargs, "closure": followed}

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not skips(optimizer):
                self.after_step(model, optimizer)

        return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)


@dataclass(frozen=True, eq=False)
class Attachment:
    """A mitigator and its hooks in an optimiser."""

    mitigator: Mitigator
    model: weakref.ref[nn.Module]
    hooks: tuple[Any, ...]

    def remove(self) -> None:
        """Work no more."""
        for hook in self.hooks:
            hook.remove()
        if self.mitigator._attached is self:
            self.mitigator._attached = None
            self.mitigator.release()

    def move_from(self, model: nn.Module) -> None:
        """Leave the optimiser for another of the same model. Raises RuntimeError for another model."""
        if self.model() is not model:
            raise RuntimeError(
                f"This {type(self.mitigator).__name__} is attached for another model. Make one for each model, or call "
                "remove() on what attach() returned."
            )
        self.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def skips(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has found that this step of a fused optimiser is not finite, and to be skipped."""
    return bool(float(getattr(optimizer, "found_inf", 0.0)))
