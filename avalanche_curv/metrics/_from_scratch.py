"""A network that learns each task from scratch: what tells loss of plasticity from a hard task."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.logging import BaseLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from torch.optim import Optimizer

from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.plugins import _bridge

Trained = list[tuple[Any, int]]
"""The experiences of one task, and the number of iterations that each was trained for."""


@dataclass(frozen=True)
class FromScratch:
    """Trains, at the end of each task, a copy of the model as it was before the first one, on that task alone.

    `optimizer` makes a fresh optimiser of its parameters, such as `functools.partial(torch.optim.Adam, lr=1e-3)`: give
    that of the strategy. The copy is trained as `Naive` does, without plugins, with the strategy's criterion, batch
    size and epochs and for no more iterations than the strategy took, and grows its head for the task. Arguments of
    the strategy's `train(...)`, such as `shuffle=False` or `num_workers`, are not known here and have their defaults.
    `seed` draws its batches and dropout; global random states are put back. It doubles the cost of training.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, Optimizer) or not callable(self.optimizer):
            raise TypeError(
                "FromScratch needs a callable that makes an optimiser of parameters, since each task has a fresh one; "
                f"got a {type(self.optimizer).__name__}. Give functools.partial(torch.optim.Adam, lr=1e-3), say."
            )

    def learner(self, strategy: Any, initial: nn.Module, trained: Trained, number: int) -> Naive:
        """A learner with a copy of `initial`, trained on the experiences of task `number`."""
        with _seeded(part_seed(self.seed, number), strategy.device), torch.enable_grad():
            model = copy.deepcopy(initial)
            steps = _AtMost()
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
    """A copy to train later."""
    copied = copy.deepcopy(unwrapped(model))
    copied.zero_grad(set_to_none=True)
    return copied


class _AtMost(SupervisedPlugin):
    """Ends an experience after `count` iterations, where plugins of the strategy ended it early."""

    count = 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations + 1 >= self.count:  # the clock counts after the plugins
            strategy.stop_training()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random states that follow from `seed`, until they are put back."""
    devices = [device] if device.type == "cuda" else []
    with _bridge.untouched_randomness(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # and not all devices, as torch.manual_seed would
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  the legacy state is the one that transforms use
        random.seed(seed)
        yield
