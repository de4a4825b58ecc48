"""How long a curvature will take whose factor S has very many columns, said while the first of them are passed over."""

from __future__ import annotations

import warnings
from time import perf_counter
from typing import TYPE_CHECKING

from avalanche_curv.core.arguments import outside

if TYPE_CHECKING:
    from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk

MANY = 1000  # columns of S of one example, as of so many classes, that are passed over without a word
LONG = 600.0  # seconds in which all columns may be passed over without a word
KNOWN = 5.0  # seconds after which the pace is known


class Outlook:
    """The pace at which the columns of S of all examples of a risk are passed over, each in a backward pass.

    An exact kind has a column for each output but one: of a classifier as many as classes, of a language model as many
    as its vocabulary for each token. Warns (UserWarning), once, where they will take longer than ten minutes.
    """

    def __init__(self, curvature: object, risk: EmpiricalRisk) -> None:
        self.curvature, self.risk = curvature, risk
        self.started, self.done, self.said = perf_counter(), 0, False

    def took(self, examples: int, columns: int, count: int) -> None:
        """To be called after so many `columns` of some examples, which have `count` each."""
        self.done += examples * columns
        seconds = perf_counter() - self.started
        if self.said or count <= MANY or seconds < KNOWN:
            return
        expected = seconds / self.done * self.risk.examples * count
        if expected > LONG:
            self.said = True
            hours = f"{expected / 3600:,.0f} hours" if expected >= 7200 else f"{expected / 60:.0f} minutes"
            warnings.warn(
                f"{self.curvature} of {type(self.risk.base).__name__} will take about {hours}: each of "
                f"{self.risk.examples:,} examples has {count:,} columns, one for an output (a class of a token), and "
                "each takes a backward pass. Fisher(samples=1), the unbiased estimate of the Fisher, and "
                "EmpiricalFisher() take one.",
                stacklevel=outside(),
            )
