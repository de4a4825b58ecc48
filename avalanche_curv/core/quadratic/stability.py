"""Whether gradient descent on a penalty diverges by itself: lr · strength · λ_max against what is stable."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from avalanche_curv.core.options import is_number
from avalanche_curv.core.quadratic.model import QuadraticModel


class UnstablePenaltyError(RuntimeError):
    """The penalty would diverge under this learning rate and strength."""


@dataclass(frozen=True)
class Stability:
    """Gradient descent on strength · ½ δᵀCδ: each step multiplies the displacement along the top eigenvector.

    It diverges where `product` = rate · strength · λ_max exceeds `limit`: 2 for plain SGD, 2 (1 + β) with momentum β,
    and 2 (1 + β) / (1 + 2β) with Nesterov's. `rate` is lr · (1 − dampening).
    """

    rate: float
    strength: float
    sharpness: float
    limit: float

    @property
    def product(self) -> float:
        return self.rate * self.strength * self.sharpness

    @property
    def diverges(self) -> bool:
        return self.product > self.limit

    @property
    def largest_strength(self) -> float:
        """The strength at which the product reaches the limit."""
        return self.limit / (self.rate * self.sharpness)

    def __str__(self) -> str:
        return (
            f"lr {self.rate:.3g} · strength {self.strength:.3g} · λ_max {self.sharpness:.3g} = {self.product:.3g} is "
            f"above {self.limit:.3g}, so that descent on the penalty alone diverges. It is stable up to strength "
            f"{self.largest_strength:.3g} at this learning rate, or up to lr "
            f"{self.limit / (self.strength * self.sharpness):.3g} at this strength."
        )


@dataclass(frozen=True)
class Descent:
    """What decides the stability of SGD: the rate lr · (1 − dampening), and the largest stable rate · curvature."""

    rate: float
    limit: float

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Descent | None:
        """None for an optimizer that scales its steps by their size, such as Adam. With several parameter groups the
        largest learning rate counts."""
        if not isinstance(optimizer, torch.optim.SGD):
            return None
        group = max(optimizer.param_groups, key=lambda group: float(group["lr"]))
        momentum = float(group["momentum"])
        limit = 2 * (1 + momentum) / ((1 + 2 * momentum) if group["nesterov"] else 1)
        return cls(float(group["lr"]) * (1 - float(group["dampening"])), limit)


def stability(optimizer: torch.optim.Optimizer, strength: float, sharpness: float) -> Stability | None:
    """The stability of `optimizer` on strength · ½ δᵀCδ, with `sharpness` = λ_max(C); None where the optimizer is not
    SGD, and where the learning rate, the strength or λ_max is not positive.

    >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    >>> found = stability(sgd, strength=2.0, sharpness=3.0)
    >>> found.product, found.limit, found.diverges
    (3.0, 2.0, True)
    """
    descent = Descent.of(optimizer)
    if descent is None or min(descent.rate, strength, sharpness) <= 0:
        return None
    return Stability(descent.rate, strength, sharpness, descent.limit)


def sharpness_of(past: QuadraticModel) -> float:
    """λ_max(C) of a quadratic model, to within one percent."""
    return past.curvature.largest()


class Guard(ABC):
    """What is done about a penalty that would diverge."""

    @abstractmethod
    def strength(self, found: Stability) -> float:
        """The strength to train with, where `found` says that the penalty would diverge."""


@dataclass(frozen=True)
class WarnIfUnstable(Guard):
    """Warns of a penalty that would diverge, and trains on with it."""

    def strength(self, found: Stability) -> float:
        warnings.warn(f"{found} Or let guard=RescaleIfUnstable() lower it.", UserWarning, stacklevel=2)
        return found.strength


@dataclass(frozen=True)
class RescaleIfUnstable(Guard):
    """Lowers the strength to `margin` of the largest stable one, for as long as the quadratic model stays."""

    margin: float = 0.5

    def __post_init__(self) -> None:
        if not (is_number(self.margin) and 0 < self.margin <= 1):
            expected = f"RescaleIfUnstable needs a margin in (0, 1]; got {self.margin!r}."
            raise ValueError(f"{expected} 1 is the edge of stability.")

    def strength(self, found: Stability) -> float:
        return self.margin * found.largest_strength


@dataclass(frozen=True)
class StopIfUnstable(Guard):
    """Raises UnstablePenaltyError before the step that would take this penalty."""

    def strength(self, found: Stability) -> float:
        raise UnstablePenaltyError(str(found))


class Guarded:
    """The strength that a guard allows for one quadratic model, looked at again where the learning rate has changed.

    A guard that lets a diverging penalty pass is not asked again about it. λ_max is computed once.
    """

    def __init__(self, guard: Guard | None, strength: float, past: QuadraticModel) -> None:
        self.guard, self.strength, self.past = guard, strength, past
        self._known: float | None = None
        self._descent: Descent | None = None
        self._passed = guard is None

    def allowed(self, optimizer: torch.optim.Optimizer) -> float:
        """The strength for the next step of `optimizer`. Raises what the guard raises."""
        descent = None if self._passed else Descent.of(optimizer)
        if self.guard is None or descent is None or descent == self._descent:
            return self.strength
        self._descent = descent
        if self._known is None:
            self._known = sharpness_of(self.past)
        found = stability(optimizer, self.strength, self._known)
        if found is not None and found.diverges:
            allowed = self.guard.strength(found)
            self._passed, self.strength = allowed == self.strength, allowed
        return self.strength
