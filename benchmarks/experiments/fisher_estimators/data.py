"""Pairs of digits, a task each, whose batches are fetched whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from avalanche_curv.streams._benchmark import benchmark
from benchmarks.experiments.fisher_estimators import Setting
from benchmarks.experiments.plasticity.data import Images, read
from benchmarks.mnist import CLASSES, DEVIATION, MEAN

EXAMPLES = 60_000  # all training images


class Pair(Dataset):
    """Two digits, as the classes 0 and 1 of a task."""

    def __init__(self, inputs: Float[Tensor, "N d"], targets: Int[Tensor, "N"], task: int) -> None:
        self.inputs, self.targets, self.task = inputs, targets, task

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "d"], int]:
        return self.inputs[index], int(self.targets[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """A whole batch at once: inputs, targets, task labels."""
        at = torch.tensor(indices)
        return [self.inputs.index_select(0, at), self.targets.index_select(0, at), torch.full((len(at),), self.task)]


@dataclass(frozen=True)
class Stream:
    """A benchmark, what its experiences train on, and the test examples of each task."""

    benchmark: Any
    parts: tuple[Pair, ...]
    tests: tuple[Pair, ...]


def stream(setting: Setting, seed: int, dataset_root: Path | None) -> Stream:
    """Every training and test image of two digits in each task, the digits in an order drawn by `seed`."""
    whole, tested = read(setting.images, EXAMPLES, 0, dataset_root)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    digits = order.split(2)[: setting.tasks]
    parts, tests = (
        tuple(_pair(images, pair, task) for task, pair in enumerate(digits)) for images in (whole, tested)
    )
    return Stream(benchmark(list(zip(parts, tests)), list(range(setting.tasks)), 2), parts, tests)


def _pair(images: Images, digits: Tensor, task: int) -> Pair:
    """Normalised as Avalanche normalises MNIST."""
    chosen = torch.isin(images.targets, digits).nonzero().squeeze(1)
    pixels = images.scaled(chosen).flatten(1).sub_(MEAN).div_(DEVIATION)
    return Pair(pixels, (images.targets[chosen] == digits[1]).long(), task)
