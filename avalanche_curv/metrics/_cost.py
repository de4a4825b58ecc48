"""What a measurement takes beside the training between two of them, from the times of both."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience

from avalanche_curv.core.arguments import outside

now = time.perf_counter  # seconds
SHARE = 0.1  # of training, which the suggested `every` makes of measuring
FLOOR = 5.0  # seconds that a metric has spent before it says anything


class Cost:
    """The seconds that one metric has spent on measurements every n iterations, and those of the training between.

    Training is what passes between two consecutive iterations of one epoch, or of an online stream, less what this and
    other metrics measured in it. On a GPU a measurement begins when the work before it has ended.

    With m seconds a measurement and t an iteration, measuring takes longer than the training between two measurements
    where m > n t, and a tenth of it where n = 10 m / t. A copy, or one from a checkpoint, counts anew.
    """

    def __init__(self, said: bool = False) -> None:
        self.said = said
        self.spent, self.measurements = 0.0, 0
        self.trained, self.iterations = 0.0, 0
        self._begun: tuple[int, float] | None = None  # a measurement: at which iteration, and when
        self._last: tuple[int, float] | None = None  # the newest iteration that was looked at, and when

    def look(self, strategy: Any, due: bool, costs: Iterable[Cost]) -> None:
        """To be called in every iteration, when it is known whether a measurement is `due`; `costs` are those of all
        metrics."""
        clock, device = strategy.clock, getattr(strategy, "device", None)
        if due and getattr(device, "type", None) == "cuda":
            torch.cuda.synchronize(device)
        moment, number = now(), clock.train_iterations
        training = moment - sum(cost.spent for cost in costs)
        if self._last is not None and number == self._last[0] + 1 and _goes_on(strategy):
            self.trained += training - self._last[1]
            self.iterations += 1
        if self._last is None or number != self._last[0]:
            self._last = number, training
        if due:
            self._begun = number, moment

    def end(self, iteration: int) -> bool:
        """To be called when something is published; whether that was a measurement, which ends now."""
        begun, self._begun = self._begun, None
        if begun is None or begun[0] != iteration:
            return False
        self.spent += now() - begun[1]
        self.measurements += 1
        return True

    def warn(self, every: int, what: str, metric: str) -> None:
        """Warns, once, where measuring `what` takes longer than the training between two measurements."""
        if self.said or self.spent < FLOOR or not self.trained > 0:
            return
        one, iteration = self.spent / self.measurements, self.trained / self.iterations
        if one <= every * iteration:
            return
        self.said = True
        warnings.warn(
            f"Measuring {what} takes {one:.2g} s, longer than the training between two measurements, "
            f"{every * iteration:.2g} s for every={every}. With every={readable(one / SHARE / iteration)} it would be "
            f"a tenth of the training: give that to the function of metrics ({metric}), or measure fewer examples.",
            UserWarning,
            stacklevel=outside(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Cost, (self.said,)


def readable(number: float) -> int:
    """The number rounded up to one digit and zeros.

    >>> readable(0.3), readable(30), readable(31), readable(234.5), readable(1000)
    (1, 30, 40, 300, 1000)
    """
    unit = 10 ** max(0, math.floor(math.log10(number))) if number > 1 else 1
    return max(1, math.ceil(number / unit * (1 - 1e-9))) * unit


def _goes_on(strategy: Any) -> bool:
    """Whether nothing but training lies before this iteration, such as an evaluation between two epochs."""
    return strategy.clock.train_epoch_iterations > 0 or isinstance(strategy.experience, OnlineCLExperience)
