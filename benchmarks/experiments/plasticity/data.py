"""Images as tensors of bytes, brought to [0, 1] batch by batch; and the tasks that a change makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from avalanche_curv.streams.changes import (
    GrowingClasses,
    LabelFlip,
    PixelPermutation,
    RandomLabels,
    TaskChange,
    TaskVariant,
)
from benchmarks.experiments.plasticity.presets import CHANGES, SOURCES, Setting, check
from benchmarks.harness import UsageError

DAMAGED = (RuntimeError, OSError, ValueError, EOFError, LookupError, PickleError, AssertionError)  # as readers raise
MADE: dict[str, TaskChange] = dict(zip(CHANGES, (RandomLabels(), PixelPermutation(), LabelFlip(), GrowingClasses())))


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their classes; `white` is the largest value of a pixel."""

    pixels: UInt8[Tensor, "N C H W"]
    targets: Int[Tensor, "N"]
    white: int

    def scaled(self, places: Int[Tensor, "n"]) -> Float[Tensor, "n C H W"]:
        """In [0, 1]. `index_select` takes a twentieth of the time of `pixels[places]`."""
        return self.pixels.index_select(0, places).float().div_(self.white)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.pixels.shape[1:])  # type: ignore[return-value]


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


@lru_cache(maxsize=1)
def read(name: str, count: int, validation: int, dataset_root: Path | None) -> tuple[Images, Images]:
    """The first `count` training images of a data set, and its test images after the first `validation`, of classes
    that the training images have. Raises UsageError for files that are missing or damaged."""
    check(name, dataset_root)
    white = 16 if name == "digits" else 255
    pixels, targets = (part[:count] for part in _read(name, dataset_root, True))
    test_pixels, test_targets = (part[validation:] for part in _read(name, dataset_root, False))
    known = torch.isin(test_targets, targets.unique())
    return Images(pixels, targets, white), Images(test_pixels[known], test_targets[known], white)


def _read(name: str, dataset_root: Path | None, train: bool) -> tuple[Tensor, Tensor]:
    try:
        pixels, targets = READERS[name](dataset_root, train)
    except DAMAGED as error:
        folder = Path(dataset_root or ".") / SOURCES[name].place
        raise UsageError(
            f"{name} cannot be read: its files in {folder} are damaged, or not all there ({error}). Put there "
            f"{SOURCES[name].what} anew."
        ) from error
    pixels = torch.as_tensor(pixels)
    return (pixels if pixels.dim() == 4 else pixels[:, None]).contiguous(), torch.as_tensor(targets).long()


def _digits(root: Path | None, train: bool) -> tuple[Any, Any]:
    """scikit-learn's, the first 1,437 (80 %) for training."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    part = slice(0, 1437) if train else slice(1437, None)
    return pixels[part].astype(np.uint8).reshape(-1, 8, 8), targets[part]


def _mnist(root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import MNIST

    found = MNIST(root, train)
    return found.data, found.targets


def _fashion(root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import FashionMNIST

    found = FashionMNIST(root, train)
    return found.data, found.targets


def _emnist(root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import EMNIST

    found = EMNIST(root, split="balanced", train=train)
    return found.data, found.targets


def _cifar10(root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import CIFAR10

    found = CIFAR10(root, train)
    return found.data.transpose(0, 3, 1, 2), found.targets


def _cifar100(root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import CIFAR100

    found = CIFAR100(root, train)
    return found.data.transpose(0, 3, 1, 2), found.targets


def _svhn(root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision.datasets import SVHN

    found = SVHN(root, "train" if train else "test")
    return found.data, found.labels


def _tiny_imagenet(root: Path | None, train: bool) -> tuple[Any, Any]:
    """Training images class after class in turn, so that the first ones have all classes; the validation images stand
    for the test images, whose classes are not public."""
    from torchvision.datasets.folder import pil_loader

    folder = Path(root or ".") / "tiny-imagenet-200"
    classes = {name: number for number, name in enumerate((folder / "wnids.txt").read_text().split())}
    if train:
        of_class = [[(p, c) for p in sorted(folder.glob(f"train/{name}/images/*"))] for name, c in classes.items()]
        found = [example for examples in zip(*of_class) for example in examples]
    else:
        lines = [line.split("\t") for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
        found = [(folder / "val/images" / line[0], classes[line[1]]) for line in lines]
    pixels = np.stack([np.asarray(pil_loader(path)) for path, _ in found])
    return pixels.transpose(0, 3, 1, 2), [target for _, target in found]


Reader = Callable[[Path | None, bool], tuple[Any, Any]]
READERS: dict[str, Reader] = {
    "digits": _digits, "mnist": _mnist, "fashion": _fashion, "emnist": _emnist, "cifar10": _cifar10,
    "cifar100": _cifar100, "svhn": _svhn, "tiny_imagenet": _tiny_imagenet,
}
