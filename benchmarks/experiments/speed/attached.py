"""Training steps in a plain loop with the penalty of one past task: attached to the optimiser, or in the loss."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv import CurvatureRegularizer, EmpiricalFisher
from benchmarks.experiments.languages.gpt import BYTES, GPT
from benchmarks.experiments.speed.steps import network, synthetic
from benchmarks.timing import Times, interleaved

if TYPE_CHECKING:
    from benchmarks.experiments.languages.experiment import Setting
    from benchmarks.experiments.speed.experiment import Config

FEW = 3  # rounds and steps of a model whose step takes a second


def on_mlp(config: Config) -> Times:
    """Steps of the MLP."""
    return _times(lambda: network(config), synthetic(config.batch), config.rounds, config.steps)


def on_small_gpt(config: Config) -> Times:
    """Steps of the small GPT of the experiment `languages`, on cross-entropy of all bytes of random windows."""
    return _on_gpt(config.small, config.rounds, config.steps)


def on_medium_gpt(config: Config) -> Times:
    """Steps of its medium GPT."""
    return _on_gpt(config.medium, min(FEW, config.rounds), min(FEW, config.steps))


def _on_gpt(setting: Setting, rounds: int, steps: int) -> Times:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(BYTES, (setting.batch, setting.size.context + 1), generator=generator)
    return _times(lambda: GPT(setting.size), (windows[:, :-1], windows[:, 1:]), rounds, steps)


Objective = Callable[[Tensor], Tensor]
"""What is differentiated, from the loss of the task."""


def _plain(regularizer: CurvatureRegularizer, optimizer: Optimizer, model: nn.Module) -> Objective:
    return lambda loss: loss


def _attached(regularizer: CurvatureRegularizer, optimizer: Optimizer, model: nn.Module) -> Objective:
    regularizer.attach(optimizer, model)
    return lambda loss: loss


def _added(regularizer: CurvatureRegularizer, optimizer: Optimizer, model: nn.Module) -> Objective:
    return lambda loss: loss + regularizer.penalty(model, optimizer)


WAYS = {"plain": _plain, "attached": _attached, "added": _added}


def _times(build: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], rounds: int, steps: int) -> Times:
    """The median of some steps in each round."""
    return interleaved({name: _work(way, build(), batch, steps) for name, way in WAYS.items()}, rounds)


def _work(way: Any, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int) -> Callable[[], float]:
    (inputs, targets), criterion = batch, nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    regularizer = CurvatureRegularizer(1.0, curvature=EmpiricalFisher())
    regularizer.absorb(model, criterion, [batch])
    objective = way(regularizer, optimizer, model)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        objective(criterion(model(inputs), targets)).backward()
        optimizer.step()
        return time.perf_counter() - start

    return lambda: statistics.median(step() for _ in range(steps))
