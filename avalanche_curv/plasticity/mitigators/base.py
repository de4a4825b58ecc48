"""Mitigators of the loss of plasticity in any training loop."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from avalanche_curv.core.attachment import Attachment, check_attachable, stepped_by
from avalanche_curv.core.options import Configured, Fixed, Forwarded, Setting, check_whole
from avalanche_curv.core.risk.parameters import canonical_name
from avalanche_curv.core.risk.selection import ParameterSelector, Selection, selection_of
from avalanche_curv.core.state import not_state_of


class Mitigator(Configured, ABC):
    """Mitigates the loss of plasticity of one model, by what it does before or after each step of an optimiser.

    It does not hold the model, but is given it at each use, so that layers may grow or be replaced: its state is keyed
    by canonical parameter names. One mitigator serves one model and one optimiser. `include` (all where it is empty)
    and `exclude` select parameters by name ("head", "*.bias") or by type of module (nn.LayerNorm); frozen parameters,
    and those that the optimiser does not step, are never changed. Raises TypeError for other selectors.

    Options that are attributes, such as `strength`, may be set at any time and act from the next step on, checked like
    in the constructor; those that cannot be changed say so.

    A new mitigator overrides `before_step`, `after_step` or `after_task`, and `state_dict` and `load_state_dict` where
    it has state.
    """

    selection = Fixed[Selection]()
    include, exclude = Forwarded("selection"), Forwarded("selection")
    steps = Setting(check_whole)

    def __init__(self, *, include: Iterable[ParameterSelector] = (), exclude: Iterable[ParameterSelector] = ()) -> None:
        self.selection = selection_of(include, exclude)
        self.steps = 0  # of the optimiser, so far
        self._attached: Attachment | None = None
        self._selected: dict[str, bool] = {}  # by parameter name, until the next `prepare`

    def attach(self, optimizer: Optimizer, model: nn.Module) -> Attachment:
        """Works around each `optimizer.step()` from now on, until `remove()` of what is returned, which is a context
        manager too.

        Gradients are unscaled by then (`torch.amp.GradScaler` does it before the step), and clipped where the loop
        clips them: what a mitigator adds is not clipped. In a step with a closure, as PyTorch Lightning takes, it
        works after the closure; steps that a gradient scaler makes a fused optimiser skip do not count. Attached again
        for the same model, as to a new optimiser for each task, it leaves the old optimiser.

        Raises TypeError for LBFGS, which evaluates closures several times: add `strength * penalty(model)` to the loss
        there. Raises ValueError where the optimiser steps no parameter that is selected, RuntimeError where the
        mitigator is attached for another model.
        """
        self._check(optimizer, model)
        if self._attached is not None:
            self._attached.check_model(model)
            self._attached.remove()
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
        self._attached = Attachment.around_steps(
            self, optimizer, model,
            before=lambda stepping, _: self.before_step(model, stepping),
            after=lambda stepping: self.after_step(model, stepping),
        )
        return self._attached

    def detach(self, attachment: Attachment) -> None:
        """Called when an attachment is removed."""
        if self._attached is attachment:
            self._attached = None
            self.release()

    def prepare(self, model: nn.Module) -> None:
        """Inspects the model before training, and again after it has grown.

        Raises ValueError for a selector that fits no parameter, for a model of which no selected parameter trains, and
        for a parameter of a lazy module without a shape; TypeError for a complex parameter. Mitigators with needs of
        their own raise for models that do not meet them.
        """
        self._selected = {}
        self.selection.check(model)
        parameters = self.parameters(model)
        if not parameters:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter that {type(self).__name__} selects. Set "
                "requires_grad=True on some, or let include and exclude leave one that is."
            )
        for name, parameter in parameters.items():
            if parameter.is_complex():
                raise TypeError(f"Parameter '{name}' is complex; mitigators know real ones. Exclude or freeze it.")

    def release(self) -> None:
        """Drops references to the model and hooks that `prepare` made; called when the mitigator is detached."""

    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called between the backward pass and the step."""

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called after the step, which it counts."""
        self.steps += 1

    @property
    def acts_between_tasks(self) -> bool:
        """Whether `after_task` does anything."""
        return False

    def after_task(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Called between two tasks, by loops that know their boundaries, when the first has been evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """The state with which a resumed run equals an uninterrupted one, as for torch's modules and optimisers."""
        return {"mitigator": type(self).__name__, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for anything else, with what came."""
        own = type(self).__name__
        if not isinstance(state, Mapping) or state.get("mitigator") != own or state.keys() != self.state_dict().keys():
            raise ValueError(not_state_of(own, state))
        self.steps = state["steps"]

    def parameters(self, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, nn.Parameter]:
        """The parameters to work on by canonical name, each once: trainable, selected and, where an optimiser is given,
        stepped by it. Raises ValueError for one of a lazy module without a shape."""
        stepped = None if optimizer is None else stepped_by(optimizer)
        found = {
            canonical_name(name): parameter
            for name, parameter in self.selection.of(model, self._selected)
            if parameter.requires_grad and (stepped is None or id(parameter) in stepped)
        }
        if (lazy := next((name for name, parameter in found.items() if is_lazy(parameter)), None)) is not None:
            raise ValueError(f"Parameter '{lazy}' has no shape yet. Pass a batch through the model first.")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are attached to nothing."""
        return self.__dict__ | {"_attached": None}

    def _check(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Raises TypeError for arguments of other types, and for LBFGS."""
        check_attachable(optimizer, model)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"{type(self).__name__} cannot follow LBFGS, which makes gradients anew inside its step. Add the "
                "penalty to the loss in its closure, or use another optimiser."
            )
