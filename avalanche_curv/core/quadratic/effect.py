"""Whether a penalty does anything: how much of a step it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.paces import share_of_step
from avalanche_curv.core.quadratic.stability import StrengthSuggestion

FIRST_LOOK = 8  # updates: at its anchor a penalty has no gradient, and leaves it by a few steps of the task
NEGLIGIBLE = 1e-2  # of a step


class StepEffect:
    """The largest share that a penalty had in the steps of an experience, from a look at the updates 8, 16, 32, ... of
    it: of its part in the step, as the curvature of the past measures both (`share_of_step`).

    The largest and not the mean, because the penalty grows with the distance from the anchor: one that decides where
    training ends may be nothing for most of the way. An experience of fewer updates is judged with the ones after it.
    """

    def __init__(self) -> None:
        self._updates, self._largest = 0, -math.inf

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


def idle(number: int, strength: float, share: float, suggestion: StrengthSuggestion) -> str:
    """What to say of a penalty with a `negligible` share in the steps of experience `number`."""
    return (
        f"The penalty did nothing in experience {number}: at strength {strength:g} its part in a step, where the past "
        f"depends on it, was never more than {share:.1e}, at the updates that were looked at. "
        f"{suggestion.above(strength)}"
    )
