"""How a quadratic model stays bounded below where its slope leaves the range of its curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from avalanche_curv.core.options import check_number, settle

if TYPE_CHECKING:
    from avalanche_curv.core.quadratic.model import QuadraticModel


class Damping(ABC):
    """How much of τ ‖δ‖² / 2 a quadratic model with the slope g gets.

    With positive semi-definite C and τ > 0 the model q + ½ τ ‖δ‖² is bounded below, also where g leaves the range of C.
    """

    @abstractmethod
    def amount(self, model: QuadraticModel) -> float:
        """τ ≥ 0 for a quadratic model with its slope g and anchor a."""


@dataclass(frozen=True)
class Tikhonov(Damping):
    """A fixed τ ≥ 0, in units of curvature."""

    tau: float

    def __post_init__(self) -> None:
        settle(self, tau=partial(check_number, at_least=0, hint="0 leaves q as it is."))

    def amount(self, model: QuadraticModel) -> float:
        return self.tau


@dataclass(frozen=True)
class StepBound(Damping):
    """τ = ‖g‖ / (radius · ‖a‖): the minimum of q then lies within `radius` times the length of its anchor a.

    For ‖(C + τI)⁻¹ g‖ ≤ ‖g‖ / τ = radius · ‖a‖ whatever the positive semi-definite C. At a minimum of past loss, where
    g = 0, nothing is added.
    """

    radius: float = 10.0

    def __post_init__(self) -> None:
        hint = "It counts in lengths of the anchor: 10 keeps the minimum of q within ten times the norm of parameters."
        settle(self, radius=partial(check_number, above=0, hint=hint))

    def amount(self, model: QuadraticModel) -> float:
        if model.gradient is None:
            return 0.0
        length = float(model.anchor.norm()) or 1.0  # all parameters zero: the radius counts in their own units
        return float(model.gradient.norm()) / (self.radius * length)
