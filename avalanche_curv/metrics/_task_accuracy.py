"""How well each task was learned by its end, and how well a network from scratch learns it."""

from __future__ import annotations

import math
from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from torch import nn

from avalanche_curv.metrics._from_scratch import FromScratch, Trained, initial_copy
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.metrics.accuracy import are_classes
from avalanche_curv.plugins import _bridge

AT_ONCE = 256  # examples


class TrainingAccuracyMetric(ScalarMetric):
    """`plasticity_experience/accuracy` at the end of each task, and beside it `accuracy_from_scratch` and their
    difference, `loss_of_plasticity`, where `from_scratch` says how. See `plasticity_metrics`."""

    def __init__(self, from_scratch: FromScratch | None) -> None:
        super().__init__(every=1)
        if from_scratch is not None and not isinstance(from_scratch, FromScratch):
            raise TypeError(
                f"from_scratch takes FromScratch(optimizer=...) or None; got {from_scratch!r}. "
                "FromScratch(functools.partial(torch.optim.Adam, lr=1e-3)), say."
            )
        self.from_scratch = from_scratch
        self._task_ends = _bridge.TaskEnds()
        self._initial: nn.Module | None = None
        self._trained: Trained = []  # of the task
        self._tasks = 0

    def before_training(self, strategy: Any) -> None:
        if self.from_scratch is not None and self._initial is None:
            self._initial = initial_copy(strategy.model)

    def before_training_exp(self, strategy: Any) -> None:
        if self.from_scratch is None:
            return
        _bridge.check_experience(strategy)
        targets = _bridge.collected(_bridge.data_of(strategy.experience), [0])[1]
        if not are_classes(targets):
            raise ValueError(
                f"from_scratch compares accuracies, but the targets are no classes: {targets.dtype} of shape "
                f"{tuple(targets.shape[1:])}. Leave it out."
            )
        self._trained.append((strategy.experience, 0))

    def after_training_iteration(self, strategy: Any) -> None:
        if self._trained:
            experience, count = self._trained[-1]
            self._trained[-1] = experience, count + 1

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        if not self._task_ends.here(strategy):
            return []
        trained, number = self._trained, self._tasks
        self._trained, self._tasks = [], number + 1
        values = {"accuracy": training_accuracy(strategy, strategy.experience)}
        if self.from_scratch is not None and self._initial is not None:
            learner = self.from_scratch.learner(strategy, self._initial, trained, number)
            values["accuracy_from_scratch"] = training_accuracy(learner, strategy.experience)
            values["loss_of_plasticity"] = values["accuracy_from_scratch"] - values["accuracy"]
        defined = {f"plasticity_experience/{n}": value for n, value in values.items() if not math.isnan(value)}
        return self.publish(strategy, defined)


def training_accuracy(strategy: Any, experience: Any) -> float:
    """The share of the task's training examples that the strategy's model classifies rightly, in eval mode and without
    training augmentation; NaN for targets that are no classes, and without examples."""
    dataset = _bridge.data_of(experience)
    right = 0
    for start in range(0, len(dataset), AT_ONCE):
        batch = _bridge.collected(dataset, list(range(start, min(start + AT_ONCE, len(dataset)))))
        if not are_classes(batch[1]):
            return math.nan
        right += _bridge.correct(strategy, batch)[0]
    return right / len(dataset) if len(dataset) else math.nan
