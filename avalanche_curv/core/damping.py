"""What keeps a quadratic model with a slope bounded below: ½ τ ‖δ‖² beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from avalanche_curv.core.options import is_number
from avalanche_curv.core.quadratic import QuadraticModel
from avalanche_curv.core.structures.damped import damped_matrix


class Damping(ABC):
    """How much of τ ‖δ‖² / 2 a quadratic model with the slope g gets.

    With positive semi-definite C and τ > 0 the model q + ½ τ ‖δ‖² is bounded below, also where g leaves the range of C.
    """

    @abstractmethod
    def amount(self, model: QuadraticModel) -> float:
        """τ."""


def damped(model: QuadraticModel, tau: float) -> QuadraticModel:
    """q + ½ τ ‖δ‖²."""
    return replace(model, curvature=damped_matrix(model.curvature, tau)) if tau else model


@dataclass(frozen=True)
class Tikhonov(Damping):
    """A fixed τ ≥ 0, in units of curvature."""

    tau: float

    def __post_init__(self) -> None:
        if not (is_number(self.tau) and self.tau >= 0):
            raise ValueError(f"Tikhonov needs a finite τ of at least 0; got {self.tau!r}. 0 leaves q as it is.")

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
        if not (is_number(self.radius) and self.radius > 0):
            raise ValueError(
                f"StepBound needs a finite radius above 0, in lengths of the anchor; got {self.radius!r}. 10 keeps the "
                "minimum of q within ten times the norm of the parameters."
            )

    def amount(self, model: QuadraticModel) -> float:
        if model.gradient is None:
            return 0.0
        length = float(model.anchor.norm()) or 1.0  # all parameters zero: the radius counts in their own units
        return float(model.gradient.norm()) / (self.radius * length)
