"""Permuted MNIST from tensors: the examples of Avalanche's `PermutedMNIST`, without a transform for each of them.

Avalanche permutes and normalises one image at a time, 65 µs each; here an experience is two tensor operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avalanche_curv.streams import PermutedDigits
from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.data import CLASSES, PIXELS, mnist
from benchmarks.training import Data


@dataclass(frozen=True)
class Stream:
    """A benchmark, and what its first experience trains on and all test on as tensors."""

    benchmark: Any
    first: Data
    tests: tuple[Data, ...]


@lru_cache(maxsize=1)  # the runs of one seed follow each other
def permuted_mnist(experiences: int, seed: int, dataset_root: Path | None, examples: int = 60_000) -> Stream:
    """The benchmark of `PermutedMNIST(experiences, seed=seed)`, its inputs as vectors of 784 pixels, with a random part
    of so many training examples in each experience."""
    (x, y), (test_x, test_y) = mnist(dataset_root)
    state = np.random.RandomState(seed)  # the generator that Avalanche draws its permutations from
    orders = [torch.from_numpy(state.permutation(PIXELS)) for _ in range(experiences)]
    parts = [some(len(y), examples, seed, number) for number in range(experiences)]
    splits = [
        (Examples(x[part][:, order], y[part]), Examples(test_x[:, order], test_y))
        for part, order in zip(parts, orders)
    ]
    train, tests = zip(*(((a.inputs, a.targets), (b.inputs, b.targets)) for a, b in splits))
    return Stream(benchmark(splits, [0] * experiences, CLASSES), train[0], tests)


def some(total: int, count: int, seed: int, number: int) -> Tensor:
    """Sorted indices of `count` of so many examples, or of all, for experience `number`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    return torch.randperm(total, generator=generator)[:count].sort().values


@lru_cache(maxsize=1)
def permuted_digits(experiences: int, seed: int, dataset_root: Path | None, examples: int = 60_000) -> Stream:
    """All digits of scikit-learn, which need no download, for quick runs."""
    found = PermutedDigits(experiences, seed=seed)
    return Stream(found, _tensors(found.train_stream[0]), tuple(_tensors(e) for e in found.test_stream))


def _tensors(experience: Any) -> Data:
    items = [experience.dataset[index] for index in range(len(experience.dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
