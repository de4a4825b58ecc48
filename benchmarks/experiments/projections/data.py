"""Permuted images without a copy for each task, and batches by one index each.

Avalanche's loader goes example by example, which takes as long as a step of this network with a batch of 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.training.plugins import SupervisedPlugin
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avalanche_curv.streams._benchmark import benchmark
from benchmarks.experiments.plasticity.data import Images, read
from benchmarks.experiments.projections import Setting
from benchmarks.mnist import CLASSES, DEVIATION, MEAN
from benchmarks.training import Data

Batch = list[Tensor]
"""Inputs, targets, task labels."""


class Permuted(Dataset):
    """All images of one or more tasks, the pixels of each task in an order of its own: those of the first task, then
    those of the next."""

    def __init__(self, pixels: Float[Tensor, "N d"], classes: Int[Tensor, "N"], orders: Int[Tensor, "T d"]) -> None:
        self.pixels, self.classes, self.orders = pixels, classes, orders
        self.targets = classes.repeat(len(orders))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "d"], int]:
        task, place = divmod(index, len(self.pixels))
        return self.pixels[place][self.orders[task]], int(self.classes[place])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A whole batch at once, as PyTorch's loader asks for it where this method is known."""
        at = torch.tensor(indices)
        rows = self.pixels.index_select(0, at % len(self.pixels))
        inputs = rows.gather(1, self.orders.index_select(0, at // len(self.pixels)))
        return [inputs, self.targets.index_select(0, at), torch.zeros(len(at), dtype=torch.long)]

    def all(self) -> Data:
        """Inputs and targets of the first task."""
        return self.pixels[:, self.orders[0]], self.classes


class WholeBatches(SupervisedPlugin):
    """Loads each batch of `parts[t]`, the examples of experience t, at once: the batches of Avalanche's own loader,
    from the same random draws. Put it before plugins that bring a loader of their own."""

    def __init__(self, parts: Sequence[Permuted]) -> None:
        super().__init__()
        self.parts = parts

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        part = self.parts[strategy.experience.current_experience]
        strategy.dataloader = _Loader(part, strategy.adapted_dataset, strategy.train_mb_size)


class _Loader(TaskBalancedDataLoader):
    """Avalanche's loader with its sampler, whose batches are fetched from `part`."""

    def __init__(self, part: Permuted, data: Any, batch_size: int) -> None:
        super().__init__(data, batch_size=batch_size, oversample_small_groups=True, shuffle=True)
        self.part = part

    def _make_pytorch_loader(self, datasets: Any, batch_sampler: Any) -> DataLoader:
        return DataLoader(self.part, batch_sampler=batch_sampler, collate_fn=_as_it_is)


def _as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Stream:
    """A benchmark, what its experiences train on, and the test examples of each task."""

    benchmark: Any
    parts: tuple[Permuted, ...]
    tests: tuple[Permuted, ...]


def stream(setting: Setting, seed: int, dataset_root: Path | None, *, at_once: bool) -> Stream:
    """The permutations of Avalanche's `PermutedMNIST(seed=seed)`, of which also the first is one, an experience each or
    all in one."""
    train, test = (_scaled(part) for part in read(setting.images, setting.examples, 0, dataset_root))
    return permuted(train, test, setting.tasks, seed, at_once=at_once)


def permuted(train: Data, test: Data, tasks: int, seed: int, *, at_once: bool) -> Stream:
    """The same of any images: a permutation of the pixels for each task, also for the first."""
    state = np.random.RandomState(seed)  # the generator that Avalanche draws its permutations from
    orders = torch.stack([torch.from_numpy(state.permutation(train[0].shape[1])) for _ in range(tasks)])
    parts = tuple(Permuted(*train, some) for some in ([orders] if at_once else orders.split(1)))
    tests = tuple(Permuted(*test, order) for order in orders.split(1))
    splits = list(zip(parts, tests))
    return Stream(benchmark(splits, [0] * len(parts), CLASSES), parts, tests)


def _scaled(images: Images) -> Data:
    """Normalised as Avalanche normalises MNIST."""
    pixels = images.scaled(torch.arange(len(images.targets))).flatten(1)
    return pixels.sub_(MEAN).div_(DEVIATION), images.targets
