"""The optimisers of one model that a penalty is attached to: it is evaluated once for all of them, and each adds the
part of its own parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.attachment import Attachable, Attachment, stepped_by
from avalanche_curv.core.quadratic.penalty import Penalty, Pull, add_to_gradients
from avalanche_curv.core.risk.parameters import NamedParameters


@dataclass(frozen=True)
class Calls:
    """What is called in an update, of which each attached optimiser makes a part."""

    start: Callable[..., None]
    """(model, *optimizers), before it."""
    ready: Callable[..., Penalty | None]
    """(model, *optimizers), when there are gradients: the penalty to be added, None where it adds nothing."""
    look: Callable[..., None]
    """(optimizer, model, scale), when all gradients of an optimiser are there: `scale` times what they are."""
    finish: Callable[[nn.Module], None]
    """(model), after it."""


class AttachedOptimizers:
    """What works around the steps of the optimisers that a penalty is attached to, of one model.

    An update has as many steps as there are optimisers. It begins with the first of them, or with another backward
    pass, and it is `unfinished` until all have stepped, or another one begins.
    """

    def __init__(self) -> None:
        self.attachments: list[Attachment] = []  # in this order
        self.restart()

    def restart(self) -> None:
        """Before the first step of a task."""
        self.unfinished = False
        self._parts: weakref.WeakKeyDictionary[Optimizer, Part] = weakref.WeakKeyDictionary()

    def attach(self, owner: Attachable, optimizer: Optimizer, model: nn.Module, calls: Calls) -> Attachment:
        """Adds the penalty that `calls` give before each step of `optimizer` from now on, in place of another optimiser
        of the same parameters. Raises RuntimeError where another model is attached."""
        stepped = stepped_by(optimizer)
        for other, attachment in self._followed():
            attachment.check_model(model)
            if not stepped.isdisjoint(stepped_by(other)):
                attachment.remove()
        named = NamedParameters(model)
        attachment = Attachment.around_steps(
            owner, optimizer, model,
            before=lambda stepping, evaluation: self._add(stepping, named, evaluation, calls),
            after=lambda stepping: None if self._parts else self._finish(model, calls),
        )
        self.attachments = [*self.attachments, attachment]
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Called when an attachment is removed."""
        self.attachments = [one for one in self.attachments if one is not attachment]
        self._parts.clear()

    def _followed(self) -> list[tuple[Optimizer, Attachment]]:
        """The optimisers in the order of attaching, without those that are gone."""
        found = [(one.optimizer(), one) for one in self.attachments]
        self.attachments = [attachment for optimizer, attachment in found if optimizer is not None]
        return [(optimizer, attachment) for optimizer, attachment in found if optimizer is not None]

    def _add(self, optimizer: Optimizer, named: NamedParameters, evaluation: int, calls: Calls) -> Tensor | None:
        """Adds to the gradients of one optimiser its part of the penalty's; returns strength · q(θ), where it is in a
        closure and something is added. `evaluation` as in `Attachment.around_steps`."""
        part, value, model = None if evaluation else self._parts.pop(optimizer, None), None, named.model
        scale = getattr(optimizer, "grad_scale", None)
        if part is None or part.is_stale:
            optimizers = [one for one, _ in self._followed()]
            if evaluation <= 1:
                self._finish(model, calls)
                calls.start(model, *optimizers)
                self.unfinished = True
            self._parts.clear()
            parameters, stepped = named(), stepped_by(*optimizers)
            own = {name: p for name, p in parameters.items() if p.requires_grad and id(p) in stepped}
            idle = all(p.grad is None for p in own.values())  # before the first backward pass
            penalty = None if idle else calls.ready(model, *optimizers)
            if penalty is not None and len(optimizers) == 1 and not evaluation and scale is None:
                penalty.add(parameters, own)
                calls.look(optimizer, model, 1.0)
                return None
            pulls = []
            if penalty is not None:
                gradients = penalty.gradients(penalty.space.cut(parameters))
                pulls = [(own[name], g) for name, g in zip(penalty.space.names, gradients) if name in own]
                value = penalty.strength * penalty.last(gradients) if evaluation else None
            for one in optimizers if evaluation == 0 else (optimizer,):
                self._parts[one] = Part.of(one, pulls)
            part = self._parts.pop(optimizer)
            for waiting in self._parts.values():
                waiting.wait()
        add_to_gradients(part.pulls, scale)
        if part.pulls and evaluation <= 1:
            calls.look(optimizer, model, 1.0 if scale is None else scale)
        return value

    def _finish(self, model: nn.Module, calls: Calls) -> None:
        if self.unfinished:
            self.unfinished = False
            calls.finish(model)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are attached to nothing."""
        return {**vars(self), "attachments": [], "_parts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _parts=weakref.WeakKeyDictionary())


@dataclass(frozen=True)
class Part:
    """What one optimiser is to add in its next step: until then its gradients must be those of the same backward pass,
    which `witness` shows, the smallest of its parameters."""

    pulls: list[Pull]
    witness: nn.Parameter
    gradient: Tensor | None
    passes: list[None] = field(default_factory=list)
    """One for each backward pass since this part waits, which may be in the same gradient after zeroing it in place."""

    @classmethod
    def of(cls, optimizer: Optimizer, pulls: list[Pull]) -> Part:
        own = stepped_by(optimizer)
        witness = min((p for group in optimizer.param_groups for p in group["params"]), key=torch.numel)
        return cls([(p, pull) for p, pull in pulls if id(p) in own], witness, witness.grad)

    def wait(self) -> None:
        """Counts backward passes from now on, for as long as this part lives."""
        passes = self.passes
        hook = self.witness.register_post_accumulate_grad_hook(lambda _: passes.append(None))
        weakref.finalize(self, hook.remove)

    @property
    def is_stale(self) -> bool:
        """Whether the gradients are new ones; those that were only scaled or clipped are not."""
        return self.witness.grad is not self.gradient or bool(self.passes)
