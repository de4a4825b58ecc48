"""Accuracy on the training examples of each task at its end, and that of a network trained on the task from scratch.

Their difference tells loss of plasticity from a hard task.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import BaseLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from torch.optim import Optimizer

from avalanche_curv.core.nested import are_classes, described
from avalanche_curv.core.options import Fixed, check_seed, settle
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.plugins import _batches, _bridge, _outputs, _tasks

BATCH_SIZE = 256  # examples


class TrainingAccuracyMetric(ScalarMetric):
    """Publishes `plasticity_experience/accuracy` at the end of each task and, given `from_scratch`, also
    `.../accuracy_from_scratch` and the difference `.../loss_of_plasticity`; see `plasticity_metrics`.

    Raises TypeError for another `from_scratch`, and ValueError in training if it is given and targets are no classes.
    """

    from_scratch = Fixed["FromScratch | None"]()

    def __init__(self, from_scratch: FromScratch | None) -> None:
        shown = ("accuracy", "loss_of_plasticity")
        super().__init__(every=1, in_text=[f"plasticity_experience/{name}" for name in shown])
        if from_scratch is not None and not isinstance(from_scratch, FromScratch):
            raise TypeError(
                f"from_scratch takes FromScratch(optimizer=...) or None; got {from_scratch!r}. "
                "An example is FromScratch(functools.partial(torch.optim.Adam, lr=1e-3))."
            )
        self.from_scratch = from_scratch
        self._task_ends = _tasks.TaskEnds()
        self._initial: nn.Module | None = None
        self._trained: TrainedExperiences = []  # of the task
        self._tasks = 0

    def before_training(self, strategy: Any) -> None:
        if self.from_scratch is not None and self._initial is None:
            self._initial = initial_copy(strategy.model)

    def before_training_exp(self, strategy: Any) -> None:
        if self.from_scratch is None:
            return
        _bridge.check_experience(strategy)
        targets = _batches.collected(_tasks.data_of(strategy.experience), [0])[1]
        if not are_classes(targets):
            raise ValueError(
                f"from_scratch compares accuracies, but the targets are no classes: {described(targets)}. Leave "
                "it out."
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
    """The share of the training examples of `experience` that the strategy's model classifies correctly, in eval mode
    and without training augmentation; NaN for targets that are no classes, and without examples."""
    dataset = _tasks.data_of(experience)
    correct = 0
    for start in range(0, len(dataset), BATCH_SIZE):
        batch = _batches.collected(dataset, list(range(start, min(start + BATCH_SIZE, len(dataset)))))
        if not are_classes(batch[1]):
            return math.nan
        correct += _outputs.correct(strategy, batch)[0]
    return correct / len(dataset) if len(dataset) else math.nan


TrainedExperiences = list[tuple[Any, int]]
"""The experiences of one task, and the number of iterations that each was trained for."""


@dataclass(frozen=True)
class FromScratch:
    """Trains, at the end of each task, a copy of the model as it was before the first task, on that task alone.

    `optimizer` makes a new optimiser from parameters, such as `functools.partial(torch.optim.Adam, lr=1e-3)`; take that
    of the strategy. The copy is trained as by `Naive` without plugins, with the strategy's criterion, batch size and
    epochs, for no more iterations than the strategy took, and its head grows for the task. Arguments of the strategy's
    `train(...)`, such as `shuffle=False` or `num_workers`, have their defaults. Batches and dropout are drawn by
    `seed`; global random states are restored. The cost of training doubles. Raises TypeError for an optimiser in place
    of a callable.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, seed=check_seed)
        if isinstance(self.optimizer, Optimizer) or not callable(self.optimizer):
            raise TypeError(
                "FromScratch needs a callable that makes an optimiser of parameters, since each task has a fresh one; "
                f"got a {type(self.optimizer).__name__}. Give one such as functools.partial(torch.optim.Adam, lr=1e-3)."
            )

    def learner(self, strategy: Any, initial: nn.Module, trained: TrainedExperiences, number: int) -> Naive:
        """A strategy with a copy of the model `initial`, trained on the experiences of task `number` as often as
        `trained` says."""
        with _seeded(part_seed(self.seed, number), strategy.device), torch.enable_grad():
            model = copy.deepcopy(initial)
            steps = _StopAfter()
            naive = Naive(
                model=model,
                optimizer=self.optimizer(model.parameters()),
                criterion=copy.deepcopy(strategy._criterion),
                train_mb_size=strategy.train_mb_size,
                train_epochs=strategy.train_epochs,
                device=strategy.device,
                plugins=[steps],
                evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
            )
            for experience, steps.count in trained:
                naive.train(experience.train(), eval_streams=[])
        return naive


def initial_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, without wrappers and gradients, to train later."""
    copied = copy.deepcopy(unwrapped(model))
    copied.zero_grad(set_to_none=True)
    return copied


class _StopAfter(SupervisedPlugin):
    """Ends training on an experience after `count` iterations, since plugins of the strategy may end it early."""

    count = 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations + 1 >= self.count:  # the clock counts after the plugins
            strategy.stop_training()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sets all global random states from `seed` within the context, and restores them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with untouched_randomness(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # and not all devices, as torch.manual_seed would
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy state is the one that transforms use
        random.seed(seed)
        yield
