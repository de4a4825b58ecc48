"""The tasks that a change makes of images, brought to [0, 1] batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from avalanche_curv.streams.changes import (
    GrowingClasses,
    LabelFlip,
    PixelPermutation,
    RandomLabels,
    TaskChange,
    TaskVariant,
)
from benchmarks.data import Images, read
from benchmarks.experiments.plasticity.presets import CHANGES, Setting

MADE: dict[str, TaskChange] = dict(zip(CHANGES, (RandomLabels(), PixelPermutation(), LabelFlip(), GrowingClasses())))


@dataclass(frozen=True, eq=False)
class Task:
    """Images as a change shows them; without a copy."""

    images: Images
    variant: TaskVariant

    def __len__(self) -> int:
        return len(self.variant.targets)

    def batch(self, places: Int[Tensor, "n"]) -> tuple[Float[Tensor, "n C H W"], Int[Tensor, "n"]]:
        """The examples at these places, in this order."""
        indices, pixels = self.variant.indices, self.variant.pixels
        inputs = self.images.scaled(places if indices is None else indices[places])
        return (inputs if pixels is None else pixels.of(inputs)), self.variant.targets[places]

    def batches(self, order: Int[Tensor, "n"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in an order, the last batch smaller where it must."""
        return (self.batch(places) for places in order.split(size))


class Tasks:
    """The training and test examples of each task of a run. Random labels have no test examples."""

    def __init__(self, setting: Setting, seed: int, dataset_root: Path | None) -> None:
        self.train, self.test = read(setting.images, setting.count, setting.validation, dataset_root)
        self.change, self.seed = MADE[setting.change], seed
        self.classes = self.train.targets.unique()
        longest = self.change.longest(self.classes)
        self.count = setting.tasks if longest is None else min(longest, setting.tasks)

    def of(self, number: int) -> tuple[Task, Task | None]:
        """Task `number`: to train and to test on."""
        return self._shown(self.train, number), None if self.change.memorised else self._shown(self.test, number)

    def _shown(self, images: Images, number: int) -> Task:
        return Task(images, self.change.of(images.targets, self.classes, number, self.seed))
