"""Where a quadratic model of past loss is no longer believed: the trust regions of `AdaptiveRefresh`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from avalanche_curv.core.options import is_number


@dataclass(frozen=True)
class Check:
    """The loss L of stored examples against its picture q, at the anchor a and at the current parameters θ.

    `start` = L(a) = q(a), `actual` = L(θ), `predicted` = q(θ).

    >>> check = Check(start=1.0, actual=2.0, predicted=1.5)
    >>> check.error, check.ratio
    (0.5, 2.0)
    """

    start: float
    actual: float
    predicted: float

    @property
    def error(self) -> float:
        """|L(θ) − q(θ)|."""
        return abs(self.actual - self.predicted)

    @property
    def ratio(self) -> float:
        """ρ = (L(θ) − L(a)) / (q(θ) − q(a)), NaN where nothing is predicted."""
        change = self.predicted - self.start
        return (self.actual - self.start) / change if change else float("nan")


class Trust(ABC):
    """The region in which a picture is believed."""

    @abstractmethod
    def broken(self, check: Check) -> str | None:
        """Why the picture is not believed at these parameters, with its numbers; None where it is."""


@dataclass(frozen=True)
class AbsoluteError(Trust):
    """|L(θ) − q(θ)| ≤ tolerance, in units of the loss summed over past experiences."""

    tolerance: float

    def __post_init__(self) -> None:
        _check_positive("AbsoluteError", self.tolerance)

    def broken(self, check: Check) -> str | None:
        if check.error <= self.tolerance:
            return None
        return f"error {check.error:.3g} above the tolerance {self.tolerance:g}"


@dataclass(frozen=True)
class RelativeError(Trust):
    """|L(θ) − q(θ)| ≤ tolerance · max(L(θ), L(a)): a share of the loss of the stored examples."""

    tolerance: float

    def __post_init__(self) -> None:
        _check_positive("RelativeError", self.tolerance)

    def broken(self, check: Check) -> str | None:
        loss = max(check.actual, check.start)
        if check.error <= self.tolerance * loss:
            return None
        return f"error {check.error:.3g} above {self.tolerance:g} times the loss {loss:.3g}"


@dataclass(frozen=True)
class RatioBand(Trust):
    """low ≤ ρ ≤ high for the ratio ρ of the actual to the predicted change (Conn et al. 2000, section 6.1).

    Changes that are both below `floor` · L(a) are not judged: their ratio is noise.
    """

    low: float = 0.5
    high: float = 2.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not (is_number(self.low) and is_number(self.high) and self.low < 1 < self.high):
            raise ValueError(
                f"RatioBand needs low < 1 < high; got low={self.low!r}, high={self.high!r}. 1 is a perfect picture; "
                "RatioBand(0.5, 2.0) allows a factor of two either way."
            )
        if not (is_number(self.floor) and self.floor >= 0):
            raise ValueError(f"RatioBand needs a floor of at least 0; got {self.floor!r}. 0 judges every change.")

    def broken(self, check: Check) -> str | None:
        actual, predicted = check.actual - check.start, check.predicted - check.start
        if max(abs(actual), abs(predicted)) <= self.floor * check.start or self.low <= check.ratio <= self.high:
            return None
        return f"ratio {check.ratio:.3g} of actual to predicted change outside [{self.low:g}, {self.high:g}]"


def _check_positive(name: str, tolerance: object) -> None:
    if not (is_number(tolerance) and tolerance > 0):  # type: ignore[operator]
        raise ValueError(
            f"{name} needs a finite tolerance above 0; got {tolerance!r}. Smaller refreshes more often; infinity is "
            "Refresh()."
        )
