"""How work is timed: in turn, by medians, on synthetic examples."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor, nn

from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.harness.options import Options, positive

Key = TypeVar("Key")
Times = dict[str, list[float]]
"""Seconds of each work, one for each round."""
Pair = tuple[Callable[[], float], Callable[[], float]]
"""The seconds of a reference, and of some work."""


@dataclass(frozen=True)
class Repetitions(Options):
    """One seed unless asked for more: each repeats the measurement."""

    seeds: Annotated[int, positive()] = 1
    """how often all is measured; take --jobs 1, since a second job would disturb the times"""


class Stopwatch(SupervisedPlugin):
    """The median time from one iteration's end to the next's: the whole step with its data loading."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def take(self) -> float:
        """The median since the last call, in seconds."""
        median = statistics.median(b - a for a, b in zip(self.ends, self.ends[1:]))
        self.ends.clear()
        return median


def interleaved(work: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """Seconds of each work, in turn, `rounds` times after one warm-up."""
    times: dict[Key, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, timed in work.items():
            seconds = timed()
            if number:
                times[name].append(seconds)
    return times


def clocked(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that does some work and returns how many seconds it took, of processor time by `time.process_time`."""

    def timed() -> float:
        start = clock()
        work()
        return clock() - start

    return timed


def perturb(model: nn.Module, seed: int) -> None:
    """Add normal noise of standard deviation 1e-3 to all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)


def experience(inputs: Tensor, targets: Tensor) -> Any:
    """One experience of ten classes."""
    data = Examples(inputs, targets)
    return benchmark([(data, data)], [0], 10).train_stream[0]


def naive(model: nn.Module, batch: int, plugins: Sequence[Any] = (), metrics: Sequence[Any] = ()) -> Any:
    """Naive with plain stochastic gradient descent on cross-entropy, which prints and logs nothing."""
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch,
        plugins=[*plugins],
        evaluator=EvaluationPlugin(*metrics, loggers=[]),
    )


def gradient_passes(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """The work of one plain gradient of cross-entropy on each batch."""
    parameters, criterion = list(model.parameters()), nn.CrossEntropyLoss()

    def work() -> None:
        for x, y in batches:
            torch.autograd.grad(criterion(model(x), y), parameters)

    return work


def batches_of(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets in batches of `size`, the last one smaller where it must."""
    return list(zip(*(part.split(size) for part in data)))
