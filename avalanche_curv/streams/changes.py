"""How the tasks of a stream differ: what each makes of the same labelled examples.

Task t draws from a generator of its own, seeded by (seed, t): it does not depend on how many tasks there are, nor on
which was asked for before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from avalanche_curv.core.options import check_count, settle

Classes = Int[Tensor, "K"]
"""The classes of a data set, sorted."""


class PixelOrder:
    """Pixel j of what comes out is pixel π(j) of the image, for a π drawn by `seed` as soon as the size is known.

    The pixels of [C, H, W] and [H, W] are the places of the last two dimensions, moved for all channels alike; those of
    a vector are its entries.

    >>> order = PixelOrder((0, 1))
    >>> torch.equal(order.of(torch.arange(12.0)).sort().values, torch.arange(12.0))
    True
    """

    def __init__(self, seed: tuple[int, int]) -> None:
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def of(self, image: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The image with its pixels moved. Raises TypeError for what is no tensor."""
        if not isinstance(image, Tensor):
            raise TypeError(
                f"Pixels are moved in tensors; an example holds a {type(image).__name__}. Give the data set a "
                "transform that makes tensors, such as torchvision.transforms.ToTensor()."
            )
        if image.dim() < 2:
            return image.index_select(0, self.order(len(image)))
        flat = image.flatten(-2)
        return flat.index_select(-1, self.order(flat.shape[-1])).view(image.shape)

    def order(self, pixels: int) -> Int[Tensor, "P"]:
        """π as indices."""
        if pixels not in self._orders:
            self._orders[pixels] = torch.from_numpy(np.random.default_rng(self.seed).permutation(pixels))
        return self._orders[pixels]

    def __reduce__(self) -> tuple[type[PixelOrder], tuple[tuple[int, int]]]:
        return PixelOrder, (self.seed,)


@dataclass(frozen=True, eq=False)
class TaskVariant:
    """What a task makes of N labelled examples: which of them (None: all), their classes, the order of the pixels
    (None: as they are)."""

    targets: Int[Tensor, "n"]
    indices: Int[Tensor, "n"] | None = None
    pixels: PixelOrder | None = None


class TaskChange(ABC):
    """How the tasks of a `NonStationary` stream differ: a rule that makes task t of a labelled data set."""

    memorised: ClassVar[bool] = False
    """Whether labels say nothing of the images, so that a task can only be memorised and has no test examples."""

    @abstractmethod
    def of(self, targets: Int[Tensor, "N"], classes: Classes, task: int, seed: int) -> TaskVariant:
        """Returns the variant of the examples that task number `task`, from 0, trains or tests on.

        `targets` are the classes of the N examples, `classes` those of the training data. What is drawn from
        (seed, task) for `classes` is the same for training and test examples, so that both are changed alike.
        """

    def longest(self, classes: Classes) -> int | None:
        """The largest number of tasks that differ from one another, given the classes; None if it is unlimited."""
        return None


@dataclass(frozen=True)
class RandomLabels(TaskChange):
    """Each example gets a class from all classes of the data set, uniformly and anew in every task, the first included.

    Trainability alone is measured (Zhang et al. 2017; Lyle et al. 2023): every task is as hard as any other.
    """

    memorised = True

    def of(self, targets: Int[Tensor, "N"], classes: Classes, task: int, seed: int) -> TaskVariant:
        rng = np.random.default_rng((seed, task))
        return TaskVariant(classes[torch.from_numpy(rng.integers(len(classes), size=len(targets)))])


@dataclass(frozen=True)
class ShuffledLabels(TaskChange):
    """The data set's own labels, permuted among all examples anew in every task, the first included: random labels
    with the frequencies of the classes kept."""

    memorised = True

    def of(self, targets: Int[Tensor, "N"], classes: Classes, task: int, seed: int) -> TaskVariant:
        return TaskVariant(targets[torch.from_numpy(np.random.default_rng((seed, task)).permutation(len(targets)))])


@dataclass(frozen=True)
class PixelPermutation(TaskChange):
    """One uniform permutation of the pixels for each task, all channels alike; the first task is the data as they are.

    It comes after the data set's transforms (Goodfellow et al. 2014).
    """

    def of(self, targets: Int[Tensor, "N"], classes: Classes, task: int, seed: int) -> TaskVariant:
        return TaskVariant(targets, pixels=PixelOrder((seed, task)) if task else None)


@dataclass(frozen=True)
class LabelFlip(TaskChange):
    """All examples of class c become class π(c), with one uniform permutation π of the classes for each task; the first
    task is the data as they are (Elsayed & Mahmood 2024). A new output layer would do; no new features are needed.

    Each π is uniform over all K! permutations, whatever the tasks before it had: a task equals the one before, or
    the data, with probability 1 / K!, which is half of all tasks for two classes and one in 3.6 million for ten.
    """

    def of(self, targets: Int[Tensor, "N"], classes: Classes, task: int, seed: int) -> TaskVariant:
        if task == 0:
            return TaskVariant(targets)
        order = torch.from_numpy(np.random.default_rng((seed, task)).permutation(len(classes)))
        return TaskVariant(classes[order][torch.searchsorted(classes, targets)])


@dataclass(frozen=True)
class GrowingClasses(TaskChange):
    """Task t has all examples of the first `first + t * step` classes, in an order of the classes drawn by the seed.

    The last task has all classes, also where fewer than `step` are left. Defaults of Lewandowski et al. 2024, §5.
    Raises ValueError unless both are at least 1.

    >>> [GrowingClasses().longest(torch.arange(n)) for n in (5, 10, 11)]
    [1, 2, 3]
    """

    first: int = 5
    step: int = 5

    def __post_init__(self) -> None:
        settle(self, first=check_count, step=check_count)

    def of(self, targets: Int[Tensor, "N"], classes: Classes, task: int, seed: int) -> TaskVariant:
        order = torch.from_numpy(np.random.default_rng((seed, 0)).permutation(len(classes)))
        shown = classes[order[: self.first + task * self.step]]
        indices = torch.isin(targets, shown).nonzero().squeeze(1)
        return TaskVariant(targets[indices], indices)

    def longest(self, classes: Classes) -> int:
        return 1 + max(0, -(-(len(classes) - self.first) // self.step))
