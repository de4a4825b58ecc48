"""Streams over whole tensors, whose batches are fetched by one index each, and the trainer that goes with them.

Avalanche's loader goes example by example, which takes as long as a step of a small network with a batch of 10.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.training import Naive
from avalanche.training.plugins import SupervisedPlugin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from avalanche_curv.streams._benchmark import benchmark
from benchmarks.data import CLASSES
from benchmarks.harness.experiment import Record
from benchmarks.training import Data, Steps, TimedEvaluation, Trainer, mean

Batch = list[Tensor]
"""Inputs, targets, task labels."""


class Examples(Dataset):
    """Examples with the task label `task`; with `orders`, all of them once for each of its rows, their pixels in that
    order: those of the first row, then those of the next, without a copy."""

    def __init__(
        self, inputs: Float[Tensor, "N d"], classes: Int[Tensor, "N"], orders: Int[Tensor, "T d"] | None = None,
        task: int = 0,
    ) -> None:
        self.inputs, self.classes, self.orders, self.task = inputs, classes, orders, task
        self.targets = classes if orders is None else classes.repeat(len(orders))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "d"], int]:
        inputs, targets, _ = self.__getitems__([index])
        return inputs[0], int(targets[0])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once, as PyTorch's loader asks for it where this method is known."""
        at = torch.tensor(indices)
        rows = self.inputs.index_select(0, at % len(self.inputs))
        if self.orders is not None:
            rows = rows.gather(1, self.orders.index_select(0, at // len(self.inputs)))
        return [rows, self.targets.index_select(0, at), torch.full((len(at),), self.task)]

    def all(self) -> Data:
        """Inputs and targets, of the first order where there are several."""
        return self.inputs if self.orders is None else self.inputs[:, self.orders[0]], self.classes


@dataclass(frozen=True)
class TensorStream:
    """A benchmark, what its experiences train on, and the test examples of each task."""

    benchmark: Any
    parts: tuple[Examples, ...]
    tests: tuple[Examples, ...]


def permuted(train: Data, test: Data, tasks: int, seed: int, *, at_once: bool) -> TensorStream:
    """A permutation of the pixels for each task, also for the first: those of Avalanche's `PermutedMNIST(seed=seed)`.
    Each task is an experience, or with `at_once` all of them are one."""
    state = np.random.RandomState(seed)  # the generator that Avalanche draws its permutations from
    orders = torch.stack([torch.from_numpy(state.permutation(train[0].shape[1])) for _ in range(tasks)])
    parts = tuple(Examples(*train, some) for some in ([orders] if at_once else orders.split(1)))
    tests = tuple(Examples(*test, order) for order in orders.split(1))
    return TensorStream(benchmark(list(zip(parts, tests)), [0] * len(parts), CLASSES), parts, tests)


class WholeBatches(SupervisedPlugin):
    """Loads each batch of `parts[t]`, the examples of experience t, at once: the batches of Avalanche's own loader,
    from the same random draws. Put it before plugins that bring a loader of their own."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        super().__init__()
        self.parts = parts

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        part = self.parts[strategy.experience.current_experience]
        strategy.dataloader = _Loader(part, strategy.adapted_dataset, strategy.train_mb_size)


class _Loader(TaskBalancedDataLoader):
    """Avalanche's loader with its sampler, whose batches are fetched from `part`."""

    def __init__(self, part: Examples, data: Any, batch_size: int) -> None:
        super().__init__(data, batch_size=batch_size, oversample_small_groups=True, shuffle=True)
        self.part = part

    def _make_pytorch_loader(self, datasets: Any, batch_sampler: Any) -> DataLoader:
        return DataLoader(self.part, batch_sampler=batch_sampler, collate_fn=_as_it_is)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def plain_trainer(
    stream: TensorStream, model: nn.Module, optimizer: Optimizer, plugins: Iterable[SupervisedPlugin], *, batch: int,
    epochs: int | None = None, steps: int = 1, kind: type = Naive,
) -> Trainer:
    """A trainer by cross-entropy that measures nothing while it trains, for so many epochs of each experience, or,
    without `epochs`, for so many steps."""
    evaluation, ends = TimedEvaluation(loggers=[]), [Steps(steps)] if epochs is None else []
    strategy = kind(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch,
        train_epochs=epochs or steps,  # at least one step each: `Steps` ends the experience
        plugins=[WholeBatches(stream.parts), *plugins, *ends],
        evaluator=evaluation,
    )
    strategy.plugins.remove(evaluation)  # without metrics it would still be asked 24 times a step, a tenth of its time
    return Trainer(strategy, evaluation)


def accuracy_records(row: list[float], learned: int) -> Iterator[Record]:
    """The accuracies on the tasks learned so far, after the mean of them; their number is the step."""
    yield {"metric": "accuracy/seen", "value": mean(row), "step": learned}
    for task, value in enumerate(row):
        yield {"metric": f"accuracy/experience_{task}", "value": value, "step": learned}
