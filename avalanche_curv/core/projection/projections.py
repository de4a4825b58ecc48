"""Projections: of the step that the optimiser has made, of the gradient, or of one task after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from avalanche_curv.core.options import Configured, Fixed, check_kind
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.projection.protected import ProtectedSpace
from avalanche_curv.core.projection.stepping import StepMemory
from avalanche_curv.core.risk.parameters import NamedParameters, canonical_parameters
from avalanche_curv.core.risk.selection import Unprotected
from avalanche_curv.core.state import State, check_state, read, state_of, written


class Projection(ABC):
    """A method to keep steps out of a protected space. One of your own needs `before_step` and `after_step`."""

    @abstractmethod
    def before_step(self, space: ProtectedSpace, model: nn.Module, memory: StepMemory | None) -> StepMemory | None:
        """Called between the backward pass and the step.

        Returns what `after_step` needs, from what was returned at the step before: `memory`, None at the first step of
        a task.
        """

    @abstractmethod
    def after_step(self, space: ProtectedSpace, model: nn.Module, memory: StepMemory | None) -> None:
        """Called after the step, with what `before_step` has returned."""

    def check_rank(self, max_rank: int | None) -> None:  # noqa: B027  most project on any part of the space
        """Raises ValueError where this method needs all directions, and `max_rank` keeps only some."""


class _OfSteps(Projection):
    """What corrects the step that the optimiser has made, from the parameters before and after it."""

    by_task = False

    def before_step(self, space: ProtectedSpace, model: nn.Module, memory: StepMemory | None) -> StepMemory:
        memory = StepMemory(space) if memory is None else memory
        memory.begin(model)
        return memory

    def after_step(self, space: ProtectedSpace, model: nn.Module, memory: StepMemory | None) -> None:
        if memory is not None:
            memory.finish(model, by_task=self.by_task)


@dataclass(frozen=True)
class StepProjection(_OfSteps):
    """Projects the step Δ that the optimiser has made, Δ ← Δ − Δ Uᵀ U: exact for every optimiser, whatever momentum,
    weight decay, preconditioning or clipping made of the gradient.

    What is left in U is the rounding of θ, made up for at the next step (Kahan 1965), so that it does not add up.

    For float32 parameters on the CPU in one thread, where a C compiler is at hand, loops are compiled for the step, and
    a large basis over whole parameters (from 2²¹ numbers) is read in 16 bits, with a scale for every 512 numbers: a
    copy for the length of a task, of half the basis' memory. The drift ‖U Δ‖ / ‖Δ‖ is then 3e-5 √(k/P) beside the
    rounding of θ, 2e-7 for 20 and 5e-7 for 100 of 478,410 dimensions (2e-8 and 6e-8 in float32 after 100 steps of Adam
    of that size; equal, 4e-6 and 8e-6, where all steps together are as small as 1e-4 ‖θ‖), and what is taken off Δ is
    off by 3e-5 of its length in directions that are free. A basis of which more than 1e-6 would be left stays in
    float32, and so do input spaces; float64 stays float64.
    """


@dataclass(frozen=True)
class GradientProjection(Projection):
    """Projects the gradient before the step, g ← g − g Uᵀ U, as in the papers: exact for plain SGD alone. Momentum from
    before the space grew, weight decay and the preconditioning of Adam lead back into it, also of parameters that
    should hold still. For comparison."""

    def before_step(self, space: ProtectedSpace, model: nn.Module, memory: StepMemory | None) -> None:
        own = canonical_parameters(model)
        known = {name: own[name].grad for name in space.space.names}
        sparse = [name for name, gradient in known.items() if gradient is not None and gradient.is_sparse]
        if sparse:
            raise TypeError(
                f"The gradients of {sparse} are sparse, and their projections are dense. Use StepProjection(), or "
                "sparse=False in the embedding."
            )
        found = {name: torch.zeros_like(own[name]) if g is None else g for name, g in known.items()}
        protected = dict(zip(space.space.names, space.space.cut(found)))
        for name, left in space.outside(protected).items():
            protected[name].copy_(left)
            if known[name] is None and left.any():  # else the optimiser would decay what has no part in this
                own[name].grad = found[name]

    def after_step(self, space: ProtectedSpace, model: nn.Module, memory: StepMemory | None) -> None:
        return None


@dataclass(frozen=True)
class SequentialProjection(_OfSteps):
    """Projects the step on one task's complement after another, Δ ← Δ (I − V₁ᵀV₁) (I − V₂ᵀV₂) …. Where the subspaces
    are not orthogonal the later projections lead back into the earlier ones. For comparison."""

    by_task = True

    def check_rank(self, max_rank: int | None) -> None:
        if max_rank is not None:
            raise ValueError(
                "SequentialProjection() projects on the whole of each task's subspace, of which max_rank keeps a part. "
                "Leave max_rank out, or use StepProjection()."
            )


class Projector(Configured):
    """Projects the steps of one task, by a projection on one protected space.

    In a training loop of your own, after `space = space.absorb(risk, Eigenspace())` at the end of a task:

        projector = Projector(space, StepProjection())
        with projector.around_step(model):
            optimizer.step()

    Parameters that are frozen (`requires_grad=False`) stay where they are: the step is projected within the others. It
    is not for optimisers that evaluate the loss several times in one step, such as LBFGS. Raises TypeError for what is
    no space or no projection, ValueError for a model that lacks a protected parameter, RuntimeError where `after_step`
    comes without `before_step`.
    """

    space = Fixed[ProtectedSpace](
        partial(check_kind, kind=ProtectedSpace, example="ProtectedSpace().absorb(risk, Eigenspace())")
    )
    projection = Fixed[Projection](partial(check_kind, kind=Projection, example="StepProjection()"))

    def __init__(self, space: ProtectedSpace, projection: Projection) -> None:
        self.space, self.projection = space, projection
        self._within: tuple[frozenset[str], ProtectedSpace] = (frozenset(space.space.names), space)
        self._memory: StepMemory | None = None
        self._named = NamedParameters(nn.Module())
        self._stepping = False
        self._unprotected = Unprotected()

    def state_dict(self) -> State:
        """What a resumed task needs beside the `space`, which has a state of its own: what was lost in rounding at the
        last step, as tensors."""
        rest = {} if self._memory is None else {key: steps.rest for key, steps in self._memory.blocks.items()}
        return state_of("Projector", names=(*sorted(self._within[0]),), rest=written(rest))

    def load_state_dict(self, state: State) -> None:
        """Takes over what `state_dict` returned of a projector on the same space. Raises ValueError for anything else,
        with what came."""
        parts = check_state(state, "Projector", "names", "rest")["fields"]
        names, rest = frozenset(parts["names"]), read(parts["rest"])
        if not (names <= {*self.space.space.names} and rest.keys() <= self.space.blocks.keys()):
            raise ValueError(f"The state is that of a projector on another space than {self.space}. Load that before.")
        self._within, self._memory = (names, self.space.restricted(names)), None
        if rest:
            self._memory = StepMemory(self._within[1], rest)

    @contextmanager
    def around_step(self, model: nn.Module) -> Iterator[None]:
        """Projects the step that is taken within, also where it raises half-way. Warns where parameters train that are
        `unprotected`, once for each set of them."""
        self._unprotected.say(self.space.unprotected(model))
        self.before_step(model)
        try:
            yield
        finally:
            self.after_step(model)

    @torch.no_grad()
    @in_own_precision
    def before_step(self, model: nn.Module) -> None:
        """To be called between the backward pass and the step."""
        self._stepping = True
        if not self.space.is_empty:
            self._memory = self.projection.before_step(self._movable(model), model, self._memory)

    @torch.no_grad()
    @in_own_precision
    def after_step(self, model: nn.Module) -> None:
        """To be called after the step. Raises RuntimeError without a `before_step`."""
        if not self._stepping:
            raise RuntimeError("after_step() goes with a before_step() just before the step. Use around_step().")
        self._stepping = False
        if not self.space.is_empty:
            self.projection.after_step(self._within[1], model, self._memory)

    def _movable(self, model: nn.Module) -> ProtectedSpace:
        """The protected space within the parameters that are trainable now."""
        if self._named.model is not model:
            self._named = NamedParameters(model)
        own = self._named()
        if not own.keys() >= {*self.space.space.names}:
            self.space.space.tensors(model)  # raises for the one that is missing
        names = frozenset(name for name in self.space.space.names if own[name].requires_grad)
        if names != self._within[0]:
            self._within, self._memory = (names, self.space.restricted(names)), None
        return self._within[1]
