"""Accuracy on stored examples, on the current task and on past ones, during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from torch import Tensor

from avalanche_curv.core.nested import are_classes
from avalanche_curv.core.options import Fixed, Setting, check_count, check_fraction, check_seed, in_short
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.plugins import _batches, _outputs, _tasks

Batch = tuple[Tensor, Tensor, Tensor]


def check_stream(name: str, value: Any) -> Any:
    """`value`. Raises TypeError unless it is None or a sequence of experiences."""
    whole = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, Mapping))
    if value is None or (whole and (not len(value) or hasattr(value[0], "dataset"))):
        return value
    meant = f"Did you mean {name}=benchmark.test_stream?" if hasattr(value, "test_stream") or value == "test" else ""
    remedy = meant or "Give benchmark.test_stream, or a list of its experiences."
    raise TypeError(f"{name} must be a stream of experiences; got {in_short(value)}. {remedy}")


class TaskAccuracyMetric(ScalarMetric):
    """Publishes `accuracy/current_task`, `accuracy/past_tasks` (mean over tasks) and `accuracy/stored`, in eval mode.

    Tasks are measured on `stream` (the t-th experience of it for the t-th one trained) or, without one, on the
    training examples; at most `limit` examples a task, drawn by `seed`. Stored examples are the random `fraction` of
    each past experience that fidelity looks at. For targets that are no classes nothing is
    published. Raises ValueError in training for an experience of `stream` that is empty or missing.
    """

    stream = Fixed[Sequence[Any] | None](check_stream)
    fraction, seed, limit = Setting(check_fraction), Setting(check_seed), Setting(check_count)

    def __init__(self, every: int, stream: Sequence[Any] | None, fraction: float, seed: int, limit: int = 1000) -> None:
        super().__init__(every, ["accuracy/*"])
        self.stream, self.fraction, self.seed, self.limit = stream, fraction, seed, limit
        self._task_ends = _tasks.TaskEnds()
        self._current: Batch | None = None
        self._past: list[Batch] = []
        self._stored: list[Batch] = []

    def before_training_exp(self, strategy: Any) -> None:
        if self._current is None:
            number = len(self._past)
            dataset = _tasks.data_of(self._source(strategy, number))
            if not len(dataset):
                raise ValueError(f"Experience {number} of the evaluation stream is empty. Fill it, or give no stream.")
            fraction = min(1.0, self.limit / len(dataset))
            self._current = _sample(dataset, fraction, part_seed(self.seed, number))

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        return self.publish(strategy, self._measured(strategy, "accuracy")) if self.due(strategy) else []

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        values = self.publish(strategy, self._measured(strategy, "accuracy_experience"))
        if self._task_ends.here(strategy) and self._current is not None:
            dataset = _tasks.data_of(strategy.experience)
            self._stored.append(_sample(dataset, self.fraction, part_seed(self.seed, len(self._past))))
            self._past.append(self._current)
            self._current = None
        return values

    def _source(self, strategy: Any, number: int) -> Any:
        if self.stream is None:
            return strategy.experience
        number = _tasks.place_in_stream(strategy.experience, number)
        if number >= len(self.stream):
            raise ValueError(
                f"The evaluation stream has {len(self.stream)} experiences, but experience {number} is being trained. "
                "Give a stream with one experience for each that is trained, or none to measure on training examples."
            )
        return self.stream[number]

    def _measured(self, strategy: Any, group: str) -> dict[str, float]:
        parts = {"current_task": [self._current] if self._current else [], "past_tasks": self._past}
        parts["stored"] = self._stored
        values: dict[str, float] = {}
        for name, batches in parts.items():
            if batches and all(are_classes(targets) for _, targets, _ in batches):
                counts = [_outputs.correct(strategy, batch) for batch in batches]
                values[f"{group}/{name}"] = sum(correct / of for correct, of in counts) / len(counts)
        return values


def _sample(dataset: Any, fraction: float, seed: int) -> Batch:
    return _batches.collected(dataset, random_part(len(dataset), fraction, seed).tolist())
