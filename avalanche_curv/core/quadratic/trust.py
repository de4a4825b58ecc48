"""Where a quadratic model of past loss is trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

from avalanche_curv.core.options import check_number, settle


@dataclass(frozen=True)
class TrustCheck:
    """The loss L of stored examples against its quadratic model q, at the anchor a and at the current parameters θ.

    `start` = L(a) = q(a), `actual` = L(θ), `predicted` = q(θ).

    >>> check = TrustCheck(start=1.0, actual=2.0, predicted=1.5)
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
    """The region in which a quadratic model is trusted."""

    @abstractmethod
    def broken(self, check: TrustCheck) -> str | None:
        """Why the model is not trusted at these parameters, with its numbers; None where it is."""


check_tolerance = partial(check_number, above=0, hint="Smaller refreshes more often; infinity is Refresh().")


@dataclass(frozen=True)
class AbsoluteError(Trust):
    """|L(θ) − q(θ)| ≤ tolerance, in units of the loss summed over past experiences."""

    tolerance: float

    def __post_init__(self) -> None:
        settle(self, tolerance=check_tolerance)

    def broken(self, check: TrustCheck) -> str | None:
        if check.error <= self.tolerance:
            return None
        return f"error {check.error:.3g} above the tolerance {self.tolerance:g}"


@dataclass(frozen=True)
class RelativeError(Trust):
    """|L(θ) − q(θ)| ≤ tolerance · max(L(θ), L(a)): a share of the loss of the stored examples."""

    tolerance: float

    def __post_init__(self) -> None:
        settle(self, tolerance=check_tolerance)

    def broken(self, check: TrustCheck) -> str | None:
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
        settle(self, low=check_number, high=check_number)
        if not self.low < 1 < self.high:
            raise ValueError(
                f"RatioBand needs low < 1 < high; got low={self.low!r}, high={self.high!r}. 1 is a perfect prediction; "
                "RatioBand(0.5, 2.0) allows a factor of two either way."
            )
        settle(self, floor=partial(check_number, at_least=0, hint="0 judges every change."))

    def broken(self, check: TrustCheck) -> str | None:
        actual, predicted = check.actual - check.start, check.predicted - check.start
        if max(abs(actual), abs(predicted)) <= self.floor * check.start or self.low <= check.ratio <= self.high:
            return None
        return f"ratio {check.ratio:.3g} of actual to predicted change outside [{self.low:g}, {self.high:g}]"
