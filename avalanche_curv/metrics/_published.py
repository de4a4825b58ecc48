"""The base class of all metrics: named scalars at the current training iteration."""

from __future__ import annotations

from functools import partial
from typing import Any

from avalanche.benchmarks import OnlineCLExperience
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue

from avalanche_curv.core.options import Configured, Setting, check_count


class ScalarMetric(Configured, PluginMetric[dict[str, float]]):
    """A metric that emits several named floats every n iterations; `result` returns the last ones.

    Raises ValueError unless `every` is an integer of at least 1.
    """

    every = Setting(partial(check_count, hint="1 measures at each step."))

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self._last: dict[str, float] = {}

    def result(self) -> dict[str, float]:
        return self._last

    def reset(self) -> None:
        self._last = {}

    def due(self, strategy: Any) -> bool:
        """Whether to measure at this iteration: one of every n, counted from the first of the experience; of an online
        stream, which cuts experiences in small parts, from the first of all."""
        online = isinstance(strategy.experience, OnlineCLExperience)
        clock = strategy.clock
        return (clock.train_iterations if online else clock.train_exp_iterations) % self.every == 0

    def publish(self, strategy: Any, values: dict[str, float]) -> list[MetricValue]:
        """The values by name as Avalanche takes them: Python floats, at the number of training iterations so far."""
        self._last |= values
        step = strategy.clock.train_iterations
        return [MetricValue(self, name, float(value), step) for name, value in values.items()]
