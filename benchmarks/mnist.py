"""MNIST as tensors: Avalanche applies its transforms one image at a time, 65 µs each."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks.datasets.external_datasets.mnist import get_mnist_dataset
from jaxtyping import Float, UInt8
from torch import Tensor

from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.training import Data

MEAN, DEVIATION = 0.1307, 0.3081  # Avalanche's normalisation
PIXELS, CLASSES = 784, 10
BLACK = torch.zeros(1).sub(MEAN).div(DEVIATION).item()
"""A pixel of 0, normalised."""


@lru_cache(maxsize=1)
def mnist(dataset_root: Path | None) -> tuple[Data, Data]:
    """(inputs, targets) for training and for testing, normalised, [N, 784]."""
    train, test = (
        (normalised(part.data.flatten(1), MEAN, DEVIATION), part.targets) for part in get_mnist_dataset(dataset_root)
    )
    return train, test


def normalised(images: UInt8[Tensor, "..."], mean: float, deviation: float) -> Float[Tensor, "..."]:
    """What torchvision's `ToTensor` and `Normalize` make of them."""
    return images.float().div_(255).sub_(mean).div_(deviation)


def split_mnist(experiences: int, seed: int, dataset_root: Path | None, domain: bool = False) -> Any:
    """Two digits in each experience, in an order drawn by `seed`. Class-incremental: the targets are the digits 0 to 9;
    with `domain`, 0 and 1 for the first and the second digit of each pair."""
    train, test = mnist(dataset_root)
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    pairs = [tuple(sorted(pair.tolist())) for pair in order.split(2)][:experiences]
    splits = [(_pair(train, pair, domain), _pair(test, pair, domain)) for pair in pairs]
    return benchmark(splits, [0] * len(pairs), 2 if domain else CLASSES)


def _pair(data: Data, pair: tuple[int, ...], domain: bool) -> Examples:
    inputs, targets = data
    chosen = torch.isin(targets, torch.tensor(pair))
    kept = targets[chosen]
    return Examples(inputs[chosen], (kept == pair[1]).long() if domain else kept)
