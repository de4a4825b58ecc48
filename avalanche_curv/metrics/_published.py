"""The base class of all metrics: named scalars at the current training iteration."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from avalanche.benchmarks import OnlineCLExperience
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import TensorboardLogger, TextLogger, WandBLogger

from avalanche_curv.core.options import Configured, Setting, check_count
from avalanche_curv.metrics._cost import Cost


def _check_patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(one, str) for one in value):
        raise TypeError(f'{name} must be a list of patterns such as ["fidelity/*"]; got {value!r}. ["*"] is all.')
    return tuple(value)


class ScalarMetric(Configured, PluginMetric[dict[str, float]]):
    """A metric that emits several named floats every n iterations; `result` returns the last ones.

    `in_text` are patterns, as in file names, of the values that Avalanche's text loggers print (`TextLogger`,
    `InteractiveLogger`): all of them by default, and of the metrics of this package the few by which one follows a run,
    at most 25 lines for all together. Other loggers, and the evaluator, get every value in any case;
    `metric.in_text = ["*"]` prints all.

    A measurement that takes longer than the training between two of them is warned of, once, with the `every` that
    would make it a tenth of that; not before the metric has spent 5 seconds.

    Raises ValueError unless `every` is an integer of at least 1, and TypeError unless `in_text` is a list of patterns.
    """

    every = Setting(partial(check_count, hint="1 measures at each step."))
    in_text = Setting[tuple[str, ...]](_check_patterns)

    def __init__(self, every: int, in_text: Collection[str] = ("*",)) -> None:
        super().__init__()
        self.every, self.in_text = every, tuple(in_text)
        self._last: dict[str, float] = {}
        self._names: set[str] = set()  # of all values so far
        self._cost = Cost()

    def result(self) -> dict[str, float]:
        return self._last

    def reset(self) -> None:
        self._last = {}

    def due(self, strategy: Any) -> bool:
        """Whether to measure at this iteration: one of every n, counted from the first of the experience; of an online
        stream, which cuts experiences in small parts, from the first of all. To be asked at each iteration; what passes
        from a yes to `publish` is what the measurement takes."""
        online = isinstance(strategy.experience, OnlineCLExperience)
        clock = strategy.clock
        due = (clock.train_iterations if online else clock.train_exp_iterations) % self.every == 0
        metrics = strategy.evaluator.metrics
        self._cost.look(strategy, due, (one._cost for one in metrics if isinstance(one, ScalarMetric)))
        return due

    def publish(self, strategy: Any, values: dict[str, float]) -> list[MetricValue]:
        """The values by name as Avalanche takes them: Python floats, at the number of training iterations so far."""
        self._last |= values
        self._names.update(values)
        step = strategy.clock.train_iterations
        published = [MetricValue(self, name, float(value), step) for name, value in values.items()]
        if self._cost.end(step) and values:
            group = next(iter(values)).partition("/")[0]
            self._cost.warn(self.every, f"{group}/...", type(self).__name__)
        return published

    def publish_drawn(self, strategy: Any, drawn: Mapping[str, Any]) -> list[MetricValue]:
        """Figures and histograms by name, at the number of training iterations so far."""
        self._names.update(drawn)
        return [MetricValue(self, name, value, strategy.clock.train_iterations) for name, value in drawn.items()]

    def _leave_out_of_text(self, strategy: Any) -> None:
        """Takes what `in_text` does not name out of what text loggers are about to print: they hold the last value of
        each name until the end of an epoch, or of an evaluation, and the evaluator asks metrics before them."""
        for logger in strategy.evaluator.loggers:
            if isinstance(logger, TextLogger):
                for name in self._names & logger.metric_vals.keys():
                    if not any(fnmatchcase(name, pattern) for pattern in self.in_text):
                        del logger.metric_vals[name]

    after_training_epoch = after_eval_exp = after_eval = _leave_out_of_text


def finite(group: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values that are finite, each with the name of the group before its own."""
    return {f"{group}/{name}": value for name, value in values.items() if math.isfinite(value)}


def draws(strategy: Any) -> bool:
    """Whether one of the strategy's loggers shows figures and histograms."""
    return any(isinstance(logger, TensorboardLogger | WandBLogger) for logger in strategy.evaluator.loggers)
