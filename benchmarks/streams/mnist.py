"""The MNIST family: Avalanche's benchmarks, in memory.

Avalanche applies the transforms of these streams to one image at a time and anew in each epoch, 60 to 350 µs each: for
a batch, longer than a training step. Its classes, orders, permutations, angles and order of the examples are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.streams.scenario import CLASS, TASK

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

SIDE, DIGITS, SPLITS = 28, 10, 5
FASHION = 0.2860, 0.3530  # mean and deviation with which Avalanche normalises Fashion-MNIST


def split_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche.benchmarks.classic import SplitMNIST
    from avalanche.benchmarks.datasets.external_datasets.mnist import get_mnist_dataset

    from benchmarks.mnist import DEVIATION, MEAN, normalised
    from benchmarks.streams.memory import held

    found = SplitMNIST(SPLITS, seed=seed, dataset_root=root, **split_options(scenario))
    return held(found, get_mnist_dataset(root), lambda x: normalised(x, MEAN, DEVIATION), scenario, experiences)


def split_fashion_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche.benchmarks.classic import SplitFMNIST
    from avalanche.benchmarks.datasets.external_datasets.fmnist import get_fmnist_dataset

    from benchmarks.mnist import normalised
    from benchmarks.streams.memory import held

    found = SplitFMNIST(SPLITS, seed=seed, dataset_root=root, **split_options(scenario))
    return held(found, get_fmnist_dataset(root), lambda x: normalised(x, *FASHION), scenario, experiences)


def permuted_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    import torch

    orders = (torch.from_numpy(state.permutation(SIDE**2)) for state in _states(seed, experiences))
    return _moved(orders, root, scenario)


def rotated_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    import torch
    from torchvision.transforms.functional import rotate

    places = torch.arange(1.0, SIDE**2 + 1).view(1, SIDE, SIDE)  # 0 is what turns in from outside
    angles = (state.randint(-180, 181) for state in _states(seed, experiences))
    return _moved((rotate(places, float(angle)).flatten().long() - 1 for angle in angles), root, scenario)


def split_options(scenario: str) -> dict[str, bool]:
    """A scenario in the words of Avalanche's split benchmarks."""
    return {"return_task_id": scenario == TASK, "class_ids_from_zero_in_each_exp": scenario != CLASS}


def _states(seed: int, experiences: int) -> Iterator[np.random.RandomState]:
    """The generator that Avalanche draws permutations and angles from, once an experience."""
    import numpy as np

    state = np.random.RandomState(seed)
    return (state for _ in range(experiences))


def _moved(orders: Iterator[Tensor], root: Path | None, scenario: str) -> Any:
    """All digits in each experience, their pixels moved; in Avalanche's order, which is by class."""
    from benchmarks.mnist import BLACK, mnist
    from benchmarks.streams.memory import Moved, in_memory

    splits = [
        tuple(Moved(data, order, BLACK, DIGITS * number * (scenario == CLASS)) for data in mnist(root))
        for number, order in enumerate(orders)
    ]
    return in_memory(splits, scenario)
