"""Whether gradient descent on a penalty diverges by itself: lr · strength · λ_max against what is stable."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from avalanche_curv.core.eigen import largest_of_products
from avalanche_curv.core.options import is_number
from avalanche_curv.core.quadratic import QuadraticModel
from avalanche_curv.core.structures import DiagonalMatrix


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


def stability(optimizer: torch.optim.Optimizer, strength: float, past: QuadraticModel) -> Stability | None:
    """What is known of the penalty's own dynamics under SGD; None where λ_max ≤ 0, and for an optimizer that scales its
    steps by their size, such as Adam. With several parameter groups the largest learning rate counts.

    >>> from avalanche_curv.core.parameters import ParameterSpace
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> curvature = DiagonalMatrix(torch.tensor([1.0, 3.0]))
    >>> past = QuadraticModel(ParameterSpace.of(model), torch.zeros(2), curvature)
    >>> found = stability(torch.optim.SGD(model.parameters(), lr=0.5), 2.0, past)
    >>> found.product, found.limit, found.diverges
    (3.0, 2.0, True)
    """
    if not isinstance(optimizer, torch.optim.SGD) or strength == 0:
        return None
    group = max(optimizer.param_groups, key=lambda group: float(group["lr"]))
    momentum, rate = float(group["momentum"]), float(group["lr"]) * (1 - float(group["dampening"]))
    limit = 2 * (1 + momentum) / ((1 + 2 * momentum) if group["nesterov"] else 1)
    matrix = past.curvature
    if isinstance(matrix, DiagonalMatrix):
        sharpness = float(matrix.values.max())
    else:
        sharpness = largest_of_products(matrix.product, past.anchor)
    return Stability(rate, strength, sharpness, limit) if sharpness > 0 and rate > 0 else None


class Guard(ABC):
    """What is done about a penalty that would diverge."""

    @abstractmethod
    def strength(self, found: Stability) -> float:
        """The strength to train with; `found` diverges."""


@dataclass(frozen=True)
class Warn(Guard):
    """Says so, and trains on."""

    def strength(self, found: Stability) -> float:
        warnings.warn(f"{found} Or let guard=Rescale() lower it.", UserWarning, stacklevel=2)
        return found.strength


@dataclass(frozen=True)
class Rescale(Guard):
    """Lowers the strength to `margin` of the largest stable one, for as long as the picture stays."""

    margin: float = 0.5

    def __post_init__(self) -> None:
        if not (is_number(self.margin) and 0 < self.margin <= 1):
            raise ValueError(f"Rescale needs a margin in (0, 1]; got {self.margin!r}. 1 is the edge of stability.")

    def strength(self, found: Stability) -> float:
        return self.margin * found.largest_strength


@dataclass(frozen=True)
class Stop(Guard):
    """Raises UnstablePenaltyError before the first step."""

    def strength(self, found: Stability) -> float:
        raise UnstablePenaltyError(f"{found} The model and `past` are as they were.")
