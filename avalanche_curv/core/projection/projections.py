"""What is projected: the step that the optimiser has made, or something that only seems to be as good."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avalanche_curv.core.options import check_kind
from avalanche_curv.core.projection.protected import ProtectedSpace
from avalanche_curv.core.risk.parameters import canonical_name


@dataclass(frozen=True)
class StepMemory:
    """Protected parameters before a step, and by block how much they are off since they were rounded after the last
    one."""

    start: dict[str, Tensor]
    rest: dict[str, Tensor]


class Projection(ABC):
    """How steps are kept out of a protected space."""

    @abstractmethod
    def before_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> StepMemory | None:
        """Between the backward pass and the step; gives what `after_step` needs, from what it gave at the step before,
        which is None at a task's first."""

    @abstractmethod
    def after_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> None:
        """After the step."""


@dataclass(frozen=True)
class StepProjection(Projection):
    """Δ ← Δ − Δ Uᵀ U, with Δ what the optimiser has changed: exact for each of them, whatever momentum, weight decay,
    preconditioning or clipping made of the gradient.

    What is left in U is the rounding of θ, made up for at the next step (Kahan 1965), so that it does not add up.
    """

    def before_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> StepMemory:
        return _held(space, model, held)

    def after_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> None:
        if held is not None:
            space.correct(space.values(model), held.start, held.rest)


@dataclass(frozen=True)
class GradientProjection(Projection):
    """g ← g − g Uᵀ U before the step, as in the papers: exact for plain SGD alone. Momentum from before the space grew,
    weight decay and the preconditioning of Adam lead back into it, also of parameters that should hold still. Kept for
    comparison."""

    def before_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> None:
        own = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
        known = {name: own[name].grad for name in space.space.names}
        found = {name: torch.zeros_like(own[name]) if g is None else g for name, g in known.items()}
        protected = dict(zip(space.space.names, space.space.cut(found)))
        for name, left in space.outside(protected).items():
            protected[name].copy_(left)
            if known[name] is None and left.any():  # else the optimiser would decay what has no part in this
                own[name].grad = found[name]

    def after_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> None:
        return None


@dataclass(frozen=True)
class SequentialProjection(Projection):
    """Δ ← Δ (I − V₁ᵀV₁) (I − V₂ᵀV₂) …: one task's complement after another. Where their subspaces are not orthogonal
    the later projections lead back into the earlier ones. Kept to be shown."""

    def before_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> StepMemory:
        return _held(space, model, held)

    def after_step(self, space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> None:
        if held is not None:
            space.correct(space.values(model), held.start, held.rest, by_task=True)


class Projector:
    """A projection at work on one protected space, for the length of one task.

    In a training loop of your own, after `space = space.absorb(risk, Eigenspace())` at the end of a task:

        projector = Projector(space, StepProjection())
        with projector.around_step(model):
            optimizer.step()

    Parameters that are frozen (`requires_grad=False`) stay where they are: the step is projected within the others. It
    is not for optimisers that evaluate the loss several times in one step, such as LBFGS. Raises TypeError for what is
    no space or no projection, RuntimeError where `after_step` comes without `before_step`.
    """

    def __init__(self, space: ProtectedSpace, projection: Projection) -> None:
        check_kind("space", space, ProtectedSpace, "ProtectedSpace().absorb(risk, Eigenspace())")
        check_kind("projection", projection, Projection, "StepProjection()")
        self.space, self.projection = space, projection
        self._within: tuple[frozenset[str], ProtectedSpace] = (frozenset(space.space.names), space)
        self._held: StepMemory | None = None
        self._stepping = False

    @contextmanager
    def around_step(self, model: nn.Module) -> Iterator[None]:
        """The step that is taken within is projected, as far as it came if it raises."""
        self.before_step(model)
        try:
            yield
        finally:
            self.after_step(model)

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Between the backward pass and the step."""
        self._stepping = True
        if not self.space.is_empty:
            self._held = self.projection.before_step(self._movable(model), model, self._held)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """After the step."""
        if not self._stepping:
            raise RuntimeError("after_step() goes with a before_step() just before the step. Use around_step().")
        self._stepping = False
        if not self.space.is_empty:
            self.projection.after_step(self._within[1], model, self._held)

    def _movable(self, model: nn.Module) -> ProtectedSpace:
        """The space among the parameters that training may move now."""
        own = {*self.space.space.names}
        trained = (canonical_name(name) for name, p in model.named_parameters() if p.requires_grad)
        names = frozenset(name for name in trained if name in own)
        if names != self._within[0]:
            self._within, self._held = (names, self.space.restricted(names)), None
        return self._within[1]


def _held(space: ProtectedSpace, model: nn.Module, held: StepMemory | None) -> StepMemory:
    values = space.values(model)
    if held is None:
        return StepMemory({name: value.to(_wide(value.dtype), copy=True) for name, value in values.items()}, {})
    for name, value in values.items():
        held.start[name].copy_(value)
    return held


def _wide(kind: torch.dtype) -> torch.dtype:
    return torch.promote_types(kind, torch.float32)
