"""Training as the experiments share it: so many steps an experience, and the time of the metrics set apart."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn

from benchmarks.harness.experiment import Record

Data = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets."""


class Steps(SupervisedPlugin):
    """Ends each experience after `count` iterations; give the strategy at least as many epochs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations + 1 >= self.count:  # the clock counts after the plugins
            strategy.stop_training()


class CosinePerExperience(SupervisedPlugin):
    """Learning rate η_s = η (1 + cos(π s / count)) / 2 at step s of each experience (Loshchilov & Hutter 2017)."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.initial: float | None = None

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        groups = strategy.optimizer.param_groups
        if self.initial is None:
            self.initial = groups[0]["lr"]
        progress = min(1.0, strategy.clock.train_exp_iterations / self.count)
        for group in groups:
            group["lr"] = self.initial * (1 + math.cos(math.pi * progress)) / 2


class TimedEvaluation(EvaluationPlugin):
    """An evaluation plugin that knows how many seconds its metrics and loggers took."""

    seconds = 0.0

    def _update_metrics_and_loggers(self, strategy: Any, callback: str) -> Any:
        start = time.perf_counter()
        try:
            return super()._update_metrics_and_loggers(strategy, callback)
        finally:
            self.seconds += time.perf_counter() - start


class Schedule(Protocol):
    """How long and how fast is trained in each experience; the settings of the experiments are such."""

    @property
    def steps(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def rate(self) -> float: ...


def learner(
    model: nn.Module,
    schedule: Schedule,
    plugins: Iterable[SupervisedPlugin],
    evaluation: EvaluationPlugin,
    *,
    weight_decay: float = 0.0,
    kind: type = Naive,
) -> Any:
    """A strategy with Adam and cross-entropy that ends each experience after `schedule.steps` steps."""
    return kind(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=schedule.rate, weight_decay=weight_decay),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=schedule.batch,
        train_epochs=schedule.steps,  # at least one step each: `Steps` ends the experience
        plugins=[*plugins, Steps(schedule.steps)],
        evaluator=evaluation,
    )


class Trainer:
    """Trains a strategy experience by experience, and knows seconds and, of `course`, the rows of accuracies."""

    def __init__(self, strategy: Any, evaluation: TimedEvaluation) -> None:
        self.strategy, self.evaluation = strategy, evaluation
        self.seconds = self.processor_seconds = 0.0
        self.rows: list[list[float]] = []

    def course(self, experiences: Iterable[Any], tests: Sequence[Data]) -> Iterator[list[Record]]:
        """Train on all; after each experience the accuracy on every test set, and its mean over those seen."""
        for number, experience in enumerate(experiences):
            self.train(experience)
            row = self.accuracies(tests)
            self.rows.append(row)
            step = self.strategy.clock.train_iterations
            records: list[Record] = [
                {"metric": f"accuracy/experience_{k}", "value": value, "step": step} for k, value in enumerate(row)
            ]
            yield [*records, {"metric": "accuracy/seen", "value": mean(row[: number + 1]), "step": step}]

    def train(self, experience: Any) -> None:
        """One experience. `seconds` grows by the time of training alone, without metrics and loggers;
        `processor_seconds` by the processor time of all."""
        before, start, used = self.evaluation.seconds, time.perf_counter(), time.process_time()
        self.strategy.train(experience, eval_streams=[])
        self.processor_seconds += time.process_time() - used
        self.seconds += time.perf_counter() - start - (self.evaluation.seconds - before)

    def accuracies(self, tests: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        """Accuracy on each test set, in eval mode."""
        return accuracies(self.strategy.model, tests)


def accuracies(model: nn.Module, tests: Iterable[Data], tasks: Iterable[int] | None = None) -> list[float]:
    """The accuracy of a model on each test set, in eval mode; with `tasks` each by the head of its task."""
    model.eval()
    told: Iterable[tuple[int, ...]] = repeat(()) if tasks is None else ((task,) for task in tasks)
    with torch.no_grad():
        return [(model(x, *task).argmax(1) == y).float().mean().item() for (x, y), task in zip(tests, told)]


def summary(rows: list[list[float]]) -> dict[str, float]:
    """Average accuracy A = mean_j a_{T,j} and forgetting F = mean_{j<T} (a_{j,j} − a_{T,j}) of the accuracy a_{t,j}
    on task j after experience t (Chaudhry et al. 2018, with the accuracy just after learning as the reference), and
    mean_j a_{j,j}, what was learned; of a single row, which has learned all at once, its mean."""
    last = rows[-1]
    drops = [rows[j][j] - last[j] for j in range(len(rows) - 1)]
    learned = mean([row[k] for k, row in enumerate(rows)] if len(rows) > 1 else last)
    return {"average_accuracy": mean(last), "forgetting": mean(drops) if drops else 0.0, "learned": learned}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_sets(benchmark: Any, limit: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The inputs and targets of each experience of the test stream, at most the first `limit` of a fixed shuffle."""
    sets = []
    for experience in benchmark.test_stream:
        dataset = experience.dataset.eval()
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit]
        sets.append(stacked(dataset, order.tolist()))
    return sets


def stacked(dataset: Any, places: Iterable[int] | None = None) -> Data:
    """The inputs and targets of a data set of single examples, or of those at some places."""
    items = [dataset[index] for index in (range(len(dataset)) if places is None else places)]
    return torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])


def logged(evaluation: EvaluationPlugin, names: Iterable[str]) -> list[Record]:
    """The curves of some metrics as records."""
    curves = evaluation.get_all_metrics()
    return [
        {"metric": name, "value": value, "step": step}
        for name in names
        for step, value in zip(*curves.get(name, ((), ())))
    ]
