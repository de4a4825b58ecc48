"""The penalty from one step to the next, as strong as the guard allows, and its value where that is asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.penalty import Penalty, check_takes_dense_gradients
from avalanche_curv.core.quadratic.stability import Guard, Guarded


class StepPenalty:
    """strength · q(θ), with a model q of the past and a strength that may be others at each step: what is made from
    them is kept for as long as they are the same. `weight` is the strength of the last step, as the guard allowed it.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.guarded: Guarded | None = None  # made from the guard and the past when it is needed
        self._penalty: Penalty | None = None  # made from the past
        self._evaluated: Penalty | None = None  # in the last step, and not asked for its value since
        self._value: Tensor | None = None

    def restart(self, guarded: Guarded | None = None) -> None:
        """Before another model of the past, of which the guard has decided what `guarded` knows."""
        self.release()
        self.guarded = guarded

    def release(self) -> None:
        """Gives back the memory of what is made from the past, of which the value of the last step stays."""
        _ = self.last
        self._penalty = None

    def next(
        self, past: QuadraticModel | None, strength: float, guard: Guard | None, model: nn.Module,
        *optimizers: Optimizer,
    ) -> Penalty | None:
        """The penalty of the next step of `model`, of which each of the `optimizers` makes a part; None where it adds
        nothing: without a past, and at strength 0. Raises what the guard raises, and TypeError for SparseAdam."""
        self._evaluated = None
        if past is None:
            self.weight, self._value = strength, None
            return None
        if self.guarded is None or self.guarded.past is not past or self.guarded.guard is not guard:
            self.guarded = Guarded(guard, past)
        self.weight = self.guarded.allowed(strength, model, *optimizers)
        if self._penalty is None or self._penalty.of is not past:
            self._penalty = Penalty(past, self.weight)
        self._evaluated, self._penalty.strength = self._penalty, self.weight
        if self.weight == 0:
            self._penalty.move(past.space.tensors(model))
            return None
        for optimizer in optimizers:
            check_takes_dense_gradients(optimizer)
        return self._penalty

    @property
    def last(self) -> Tensor | None:
        """q(θ) at the last step, without strength, computed when it is asked for; None where there was no past."""
        if self._evaluated is not None:
            self._value, self._evaluated = self._evaluated.last(), None
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know what the guard has decided, which a schedule of learning rates would not decide
        again."""
        _ = self.last  # known from now on, without what was evaluated
        return {**vars(self), "_penalty": None}
