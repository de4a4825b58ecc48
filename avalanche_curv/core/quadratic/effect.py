"""Whether a penalty does anything: how much of a step it is, and which strengths to try where that is nothing."""

from __future__ import annotations

import math
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.paces import share_of_step
from avalanche_curv.core.quadratic.policies import Past
from avalanche_curv.core.quadratic.stability import StrengthSuggestion, suggest_strength, without_rule

FIRST_LOOK = 8  # updates: at its anchor a penalty has no gradient, and leaves it by a few steps of the task
NEGLIGIBLE = 1e-2  # of a step


class StepEffect:
    """The largest share that a penalty had in the steps of an experience, from a look at the updates 8, 16, 32, ... of
    it: of its part in the step, as the curvature of the past measures both (`share_of_step`).

    The largest and not the mean, because the penalty grows with the distance from the anchor: one that decides where
    training ends may be nothing for most of the way. An experience of fewer updates is judged with the ones after it.

    What is suggested instead is for the model and optimisers that it was last told to `see`.
    """

    def __init__(self) -> None:
        self._updates, self._largest = 0, -math.inf
        self._seen: tuple[weakref.ref[Any], ...] = ()  # the model of the last step, and its optimisers
        self._said = False  # that a penalty did nothing

    def see(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Takes note of the model of a step and its optimisers, which are not kept alive."""
        if [one() for one in self._seen] != [model, *optimizers]:
            self._seen = (weakref.ref(model), *map(weakref.ref, optimizers))

    def look(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        past: QuadraticModel,
        strength: float,
        scale: float | Tensor = 1.0,
    ) -> None:
        """To be called at each update with such a penalty, when all gradients are there: `scale` times what they
        are."""
        self._updates += 1
        if self._updates >= FIRST_LOOK and self._updates & (self._updates - 1) == 0:
            share = share_of_step(optimizer, model, past, float(scale) * strength)
            self._largest = math.inf if math.isnan(share) else max(self._largest, share)

    def negligible(self) -> float | None:
        """At the end of an experience: the largest share, where it is below 1e-2; None where it is not, or where there
        were too few updates to tell."""
        if self._updates < FIRST_LOOK:
            return None
        largest = self._largest
        self._updates, self._largest = 0, -math.inf
        return largest if largest < NEGLIGIBLE else None

    def warn(self, number: int, strength: float, past: Past) -> None:
        """At the end of experience `number`: warns where the share was `negligible`, once."""
        share = self.negligible()
        if share is not None and not self._said:
            self._said = True
            message = (
                f"The penalty did nothing in experience {number}: at strength {strength:g} its part in a step, where "
                f"the past depends on it, was never more than {share:.1e}, at the updates that were looked at. "
                f"{self.suggestion(past).above(strength)}"
            )
            warnings.warn(message, UserWarning, stacklevel=outside())

    @property
    def knows_optimizers(self) -> bool:
        return len(self._seen) > 1

    def suggestion(self, past: Past) -> StrengthSuggestion:
        """Strengths to try with the optimisers of the last step: those of the one that allows the least."""
        model, *optimizers = [one() for one in self._seen] or [None]
        found = [suggest_strength(past, one, model) for one in optimizers if one is not None and model is not None]
        return min(found, key=lambda one: one.grid[:1] or (math.inf,), default=without_rule("no optimizer is known"))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have seen no model."""
        return {**vars(self), "_seen": ()}
