"""The benchmarks of the streams, by the name of the stream: `name(seed, dataset_root, scenario, experiences)`.

The MNIST family is Avalanche's, in memory: Avalanche applies the transforms of these streams to one image at a time and
anew in each epoch, 60 to 350 µs each, for a batch longer than a training step. Its classes, orders, permutations,
angles and order of the examples are kept. Streams of photographs are Avalanche's, which read, crop and flip an image
when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import classic
from avalanche.benchmarks.datasets.external_datasets.fmnist import get_fmnist_dataset
from avalanche.benchmarks.datasets.external_datasets.mnist import get_mnist_dataset
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms.functional import rotate

from avalanche_curv.streams import PermutedDigits, RotatedDigits, SineBoundary, SplitDigits
from avalanche_curv.streams._benchmark import Examples, assembled, benchmark
from benchmarks.data import CLASSES, DEVIATION, FASHION, MEAN, mnist, normalised
from benchmarks.streams.scenario import CLASS, TASK
from benchmarks.training import Data, stacked

SIDE = 28
BLACK = torch.zeros(1).sub(MEAN).div(DEVIATION).item()
"""A pixel of 0, normalised as in MNIST."""
CORE50_ORDERS = 10  # that Avalanche has

Renamed = Callable[[Tensor, Tensor, int], Tensor]
"""(targets, classes of the experience, its number) ↦ targets."""


def permuted_digits(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    return _repeated(PermutedDigits(5, seed=seed), scenario, experiences)


def rotated_digits(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    return _repeated(RotatedDigits(5, seed=seed), scenario, experiences)


def sine(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    return _repeated(SineBoundary(9, seed=seed), scenario, experiences)


def split_digits(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    """Classes count from 0 in each experience, except in CLASS."""
    found = SplitDigits(5, seed=seed)
    return _renamed(
        found, scenario, experiences, lambda y, known, t: y if scenario == CLASS else torch.searchsorted(known, y)
    )


def split_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    found = classic.SplitMNIST(5, seed=seed, dataset_root=root, **_split(scenario))
    return _held(found, get_mnist_dataset(root), (MEAN, DEVIATION), scenario, experiences)


def split_fashion_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    found = classic.SplitFMNIST(5, seed=seed, dataset_root=root, **_split(scenario))
    return _held(found, get_fmnist_dataset(root), FASHION, scenario, experiences)


def permuted_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    orders = (torch.from_numpy(state.permutation(SIDE**2)) for state in _states(seed, experiences))
    return _moved(orders, root, scenario)


def rotated_mnist(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    places = torch.arange(1.0, SIDE**2 + 1).view(1, SIDE, SIDE)  # 0 is what turns in from outside
    angles = (state.randint(-180, 181) for state in _states(seed, experiences))
    return _moved((rotate(places, float(angle)).flatten().long() - 1 for angle in angles), root, scenario)


def split_cifar10(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    return _first(classic.SplitCIFAR10(5, seed=seed, dataset_root=root, **_split(scenario)), experiences)


def split_cifar100(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    return _first(classic.SplitCIFAR100(10, seed=seed, dataset_root=root, **_split(scenario)), experiences)


def split_tiny_imagenet(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    return _first(classic.SplitTinyImageNet(10, seed=seed, dataset_root=root, **_split(scenario)), experiences)


def core50(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    """New classes in each of 9 experiences, or new sessions in each of 8 (Lomonaco & Maltoni 2017), in the order
    `seed` mod 10 of the ten that there are.

    Avalanche has one test set for all experiences. Here the test set of an experience is all of it where the classes
    are the same throughout, and otherwise what it has of its classes.
    """
    name, folder = "nc" if scenario == CLASS else "ni", None if root is None else root / "core50"
    found = classic.CORe50(scenario=name, run=seed % CORE50_ORDERS, dataset_root=folder)
    train = [experience.dataset for experience in islice(found.train_stream, experiences)]
    everything = found.test_stream[0].dataset
    return assembled(train, [_of_classes(everything, set(part.targets)) for part in train], found.n_classes)


def mnist_pairs(experiences: int, seed: int, dataset_root: Path | None, *, domain: bool = False) -> Any:
    """MNIST with two digits in each experience, in an order drawn by `seed`. The targets are the digits 0 to 9; with
    `domain`, 0 and 1 for the first and the second digit of each pair."""
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    pairs = [pair.sort().values for pair in order.split(2)][:experiences]
    train, test = mnist(dataset_root)
    splits = [(_pair(*train, pair, domain), _pair(*test, pair, domain)) for pair in pairs]
    return benchmark(splits, [0] * len(pairs), 2 if domain else CLASSES)


def _pair(inputs: Tensor, targets: Tensor, pair: Tensor, domain: bool) -> Examples:
    chosen = torch.isin(targets, pair)
    kept = targets[chosen]
    return Examples(inputs[chosen], (kept == pair[1]).long() if domain else kept)


def _split(scenario: str) -> dict[str, bool]:
    """A scenario in the words of Avalanche's split benchmarks."""
    return {"return_task_id": scenario == TASK, "class_ids_from_zero_in_each_exp": scenario != CLASS}


def _states(seed: int, experiences: int) -> Iterator[np.random.RandomState]:
    """The generator that Avalanche draws permutations and angles from, once an experience."""
    state = np.random.RandomState(seed)
    return (state for _ in range(experiences))


class Moved:
    """Square images whose pixels move: pixel j of an example is pixel order[j] of the image, or `outside` where that is
    -1. The images, in the order of their classes, are shared by all tasks; `first` is added to the classes."""

    def __init__(self, data: Data, order: Int[Tensor, "d"], outside: float, first: int) -> None:
        pixels, classes = data
        self._pixels, self._order = pixels.numpy(), order.numpy()
        self._outside, self._value = np.flatnonzero(self._order < 0), outside
        self._places = classes.argsort(stable=True).tolist()
        self.targets: list[int] = (classes.sort().values + first).tolist()
        self._shape = (1, *2 * (round(pixels.shape[1] ** 0.5),))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "1 side side"], int]:
        image = self._pixels[self._places[index]][self._order]  # NumPy, as torch takes twice as long for one image
        image[self._outside] = self._value
        return torch.from_numpy(image).view(self._shape), self.targets[index]


def _moved(orders: Iterator[Tensor], root: Path | None, scenario: str) -> Any:
    """All digits in each experience, their pixels moved; in Avalanche's order, which is by class."""
    splits = [
        tuple(Moved(data, order, BLACK, CLASSES * number * (scenario == CLASS)) for data in mnist(root))
        for number, order in enumerate(orders)
    ]
    return _in_memory(splits, scenario)


def _held(found: Any, datasets: Sequence[Any], scale: tuple[float, float], scenario: str, experiences: int) -> Any:
    """Avalanche's split of (train, test), over the images that its transforms would give one by one."""
    names = torch.tensor(found.class_mapping)
    places = (found.train_exps_patterns_assignment, found.test_exps_patterns_assignment)
    parts = (
        [
            Examples(normalised(dataset.data[at], *scale).unsqueeze(1), names[dataset.targets[at]])
            for at in chosen[:experiences]
        ]
        for dataset, chosen in zip(datasets, places)
    )
    return _in_memory(list(zip(*parts)), scenario)


def _repeated(found: Any, scenario: str, experiences: int) -> Any:
    """A stream whose experiences share their classes; in CLASS those of each experience are others."""
    return _renamed(found, scenario, experiences, lambda y, known, t: y + t * len(known) * (scenario == CLASS))


def _renamed(found: Any, scenario: str, experiences: int, rename: Renamed) -> Any:
    splits = []
    for number, pair in enumerate(zip(found.train_stream[:experiences], found.test_stream)):
        known = torch.tensor(pair[0].classes_in_this_experience)
        parts = (stacked(experience.dataset) for experience in pair)
        splits.append([Examples(x, rename(y, known, number)) for x, y in parts])
    return _in_memory(splits, scenario)


def _in_memory(splits: Sequence[Sequence[Any]], scenario: str) -> Any:
    """The benchmark of (train, test), whose task labels count in TASK."""
    labels = [number * (scenario == TASK) for number in range(len(splits))]
    classes = {int(target) for train, _ in splits for target in set(map(int, train.targets))}
    return benchmark([(train, test) for train, test in splits], labels, len(classes))


def _of_classes(dataset: Any, classes: set[int]) -> Any:
    return dataset.subset([index for index, target in enumerate(dataset.targets) if target in classes])


def _first(found: Any, experiences: int) -> Any:
    train, test = (
        [experience.dataset for experience in islice(stream, experiences)]
        for stream in (found.train_stream, found.test_stream)
    )
    return assembled(train, test, found.n_classes)
