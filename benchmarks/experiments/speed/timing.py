"""What is timed, and how: work in turn, medians, a network and synthetic examples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv.streams._benchmark import Examples, benchmark

if TYPE_CHECKING:
    from benchmarks.experiments.speed import Config

Times = dict[str, list[float]]
"""Seconds of each work, one for each round."""


class Stopwatch(SupervisedPlugin):
    """The median time from one iteration's end to the next's: the whole step with its data loading."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def take(self) -> float:
        median = statistics.median(b - a for a, b in zip(self.ends, self.ends[1:]))
        self.ends.clear()
        return median



def interleaved(work: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Seconds of each, in turn, `rounds` times after one warm-up."""
    times: Times = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, timed in work.items():
            seconds = timed()
            if number:
                times[name].append(seconds)
    return times



def clocked(work: Callable[[], Any]) -> Callable[[], float]:
    """The seconds that some work takes."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timed



def network(config: Config) -> nn.Module:
    h = config.hidden
    return nn.Sequential(nn.Linear(784, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))



def perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)



def examples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)



def stream(config: Config, count: int, seed: int = 0) -> Any:
    data = Examples(*examples(count, seed))
    return benchmark([(data, data)], [0], 10)



def gradient_passes(model: nn.Module, criterion: nn.Module, batches: list) -> None:
    parameters = list(model.parameters())
    for x, y in batches:
        torch.autograd.grad(criterion(model(x), y), parameters)
