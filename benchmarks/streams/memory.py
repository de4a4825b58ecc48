"""Streams over tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.streams.scenario import CLASS, TASK
from benchmarks.training import Data

Renamed = Callable[[Tensor, Tensor, int], Tensor]
"""(targets, classes of the experience, its number) ↦ targets."""

Transform = Callable[[Tensor], Tensor]


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


def held(found: Any, datasets: Sequence[Any], transform: Transform, scenario: str, experiences: int) -> Any:
    """Avalanche's split of (train, test), over the images that its transforms would give one by one."""
    names = torch.tensor(found.class_mapping)
    places = (found.train_exps_patterns_assignment, found.test_exps_patterns_assignment)
    parts = (
        [Examples(transform(dataset.data[at]).unsqueeze(1), names[dataset.targets[at]]) for at in chosen[:experiences]]
        for dataset, chosen in zip(datasets, places)
    )
    return in_memory(list(zip(*parts)), scenario)


def split(found: Any, scenario: str, experiences: int) -> Any:
    """A stream whose experiences have classes of their own; except in CLASS these count from 0 in each."""
    return _renamed(found, scenario, experiences, lambda y, known, t: y if scenario == CLASS else _rank(y, known))


def repeated(found: Any, scenario: str, experiences: int) -> Any:
    """A stream whose experiences share their classes; in CLASS those of each experience are others."""
    return _renamed(found, scenario, experiences, lambda y, known, t: y + t * len(known) * (scenario == CLASS))


def _rank(targets: Tensor, known: Tensor) -> Tensor:
    return torch.searchsorted(known, targets)


def _renamed(found: Any, scenario: str, experiences: int, rename: Renamed) -> Any:
    splits = []
    for number, pair in enumerate(zip(found.train_stream[:experiences], found.test_stream)):
        known = torch.tensor(pair[0].classes_in_this_experience)
        parts = (_tensors(experience.dataset) for experience in pair)
        splits.append([Examples(x, rename(y, known, number)) for x, y in parts])
    return in_memory(splits, scenario)


def in_memory(splits: Sequence[Sequence[Any]], scenario: str) -> Any:
    """The benchmark of (train, test), whose task labels count in TASK."""
    labels = [number * (scenario == TASK) for number in range(len(splits))]
    classes = {int(target) for train, _ in splits for target in set(map(int, train.targets))}
    return benchmark([(train, test) for train, test in splits], labels, len(classes))


def _tensors(dataset: Any) -> Data:
    items = [dataset[index] for index in range(len(dataset))]
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
