"""The data sets of images: where their files lie below --dataset-root, what to put there, and the images as tensors.

Importing this imports neither torch nor torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from pickle import PickleError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from benchmarks.harness.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

MEAN, DEVIATION = 0.1307, 0.3081  # with which Avalanche normalises MNIST
FASHION = 0.2860, 0.3530  # and Fashion-MNIST
PIXELS, CLASSES = 784, 10  # of MNIST
ALL = 60_000  # training images of MNIST

UNREADABLE = (
    RuntimeError, OSError, ValueError, EOFError, LookupError, AssertionError, PickleError, BadZipFile, HTTPException
)  # fmt: skip
"""What readers and downloads raise for files that are damaged, not all there or out of reach."""


@dataclass(frozen=True)
class Source:
    """A data set: where it lies below --dataset-root, what to put there, which files these are, how many classes and
    channels its images have, and the folder that Avalanche downloads it to (none: it is not downloaded)."""

    place: str
    what: str
    files: tuple[str, ...]
    classes: int
    channels: int = 1
    downloaded: str = ""

    def missing(self, root: Path) -> list[Path]:
        """The files that are not there, or empty."""
        return [path for path in (root / self.place / name for name in self.files) if not _has_content(path)]

    def check(self, root: Path) -> None:
        """Raises UsageError where a file is not there, or empty."""
        missing = self.missing(root)
        if missing:
            raise UsageError(
                f"{missing[0]} is not there, or empty. Put into {root / self.place} {self.what}; see --dataset-root."
            )

    def unreadable(self, root: Path | None, error: BaseException) -> UsageError:
        """What to say when reading raises, or downloading where there is no root."""
        said = " ".join(str(error).split()) or type(error).__name__
        if root is None:
            return UsageError(
                f"{self.downloaded} can be neither read from Avalanche's own folder nor downloaded ({said}). Give "
                f"--dataset-root DIR, with {self.what} in DIR/{self.place}."
            )
        return UsageError(
            f"the files in {root / self.place} are damaged, or not all there ({said}). Put there {self.what} anew."
        )


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
IDX = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in KINDS)
BALANCED = tuple(f"emnist-balanced-{part}-{kind}" for part in ("train", "test") for kind in KINDS)
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
SVHN = ("train_32x32.mat", "test_32x32.mat")
TINY = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
CORE50 = (
    "core50_128x128", "batches_filelists/NC_inc", "batches_filelists/NI_inc",
    "paths.pkl", "LUP.pkl", "labels.pkl", "labels2names.pkl",
)  # fmt: skip
SOURCES = {
    "digits": Source(".", "", (), 10),
    "mnist": Source(
        "MNIST/raw", f"the four IDX files of MNIST, unpacked ({', '.join(IDX)})", IDX, 10, downloaded="mnist"
    ),
    "fashion": Source(
        "FashionMNIST/raw", f"the four IDX files of Fashion-MNIST, unpacked ({', '.join(IDX)})", IDX, 10,
        downloaded="fashionmnist",
    ),
    "emnist": Source("EMNIST/raw", f"the IDX files {', '.join(BALANCED)}", BALANCED, 47),
    "cifar10": Source(
        "cifar-10-batches-py", f"CIFAR-10, the version for Python, unpacked ({', '.join(BATCHES)})", BATCHES, 10, 3,
        downloaded="cifar10",
    ),
    "cifar100": Source(
        "cifar-100-python", "CIFAR-100, the version for Python, unpacked (train, test, meta)",
        ("train", "test", "meta"), 100, 3, downloaded="cifar100",
    ),
    "svhn": Source(".", f"{' and '.join(SVHN)}, the cropped digits of SVHN", SVHN, 10, 3),
    "tiny_imagenet": Source(
        "tiny-imagenet-200", f"tiny-imagenet-200.zip, unpacked ({', '.join(TINY)})", TINY, 200, 3,
        downloaded="tinyimagenet",
    ),
    "core50": Source(
        "core50", f"core50_128x128.zip and batches_filelists.zip of CORe50, unpacked, and its four pickles "
        f"({', '.join(CORE50)})", CORE50, 50, 3, downloaded="core50",
    ),
}  # fmt: skip
TORCHVISION = {"mnist": "MNIST", "fashion": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def has(images: str, dataset_root: Path | None) -> bool:
    """Whether the files of a data set are there."""
    source = SOURCES[images]
    return not source.files if dataset_root is None else not source.missing(dataset_root)


def check(images: str, dataset_root: Path | None) -> None:
    """Raises UsageError where a file of a data set is not there, or empty."""
    source = SOURCES[images]
    if dataset_root is not None:
        source.check(dataset_root)
    elif source.files:
        raise UsageError(
            f"{images} is read from files: give --dataset-root DIR, with {source.what} in DIR/{source.place}."
        )


@dataclass(frozen=True, eq=False)
class Images:
    """Images as bytes, and their classes; `white` is the largest value of a pixel."""

    pixels: UInt8[Tensor, "N C H W"]
    targets: Int[Tensor, "N"]
    white: int

    def scaled(self, places: Int[Tensor, "n"]) -> Float[Tensor, "n C H W"]:
        """Those at some places, in [0, 1]. `index_select` takes a twentieth of the time of `pixels[places]`."""
        return self.pixels.index_select(0, places).float().div_(self.white)

    def vectors(self, mean: float = 0.0, deviation: float = 1.0) -> Float[Tensor, "N d"]:
        """All, flattened and brought to [0, 1]; then less `mean`, over `deviation`."""
        return self.pixels.flatten(1).float().div_(self.white).sub_(mean).div_(deviation)

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.pixels.shape[1:])  # type: ignore[return-value]


@lru_cache(maxsize=1)
def read(name: str, count: int, validation: int, dataset_root: Path | None) -> tuple[Images, Images]:
    """The first `count` training images of a data set, and its test images after the first `validation`, of classes
    that the training images have. Raises UsageError for files that are missing or damaged."""
    import torch

    check(name, dataset_root)
    white = 16 if name == "digits" else 255
    pixels, targets = (part[:count] for part in _read(name, dataset_root, True))
    test_pixels, test_targets = (part[validation:] for part in _read(name, dataset_root, False))
    known = torch.isin(test_targets, targets.unique())
    return Images(pixels, targets, white), Images(test_pixels[known], test_targets[known], white)


def _read(name: str, root: Path | None, train: bool) -> tuple[Tensor, Tensor]:
    import torch

    reader = {"digits": _digits, "tiny_imagenet": _tiny_imagenet}.get(name)
    try:
        pixels, targets = reader(root, train) if reader else _by_torchvision(name, root, train)
    except UNREADABLE as error:
        raise SOURCES[name].unreadable(root, error) from error
    pixels = torch.as_tensor(pixels)
    return (pixels if pixels.dim() == 4 else pixels[:, None]).contiguous(), torch.as_tensor(targets).long()


def _by_torchvision(name: str, root: Path | None, train: bool) -> tuple[Any, Any]:
    from torchvision import datasets

    if name == "svhn":
        found = datasets.SVHN(root, "train" if train else "test")
        return found.data, found.labels
    if name == "emnist":
        found = datasets.EMNIST(root, split="balanced", train=train)
    else:
        found = getattr(datasets, TORCHVISION[name])(root, train)
    return (found.data.transpose(0, 3, 1, 2) if SOURCES[name].channels == 3 else found.data), found.targets


def _digits(root: Path | None, train: bool) -> tuple[Any, Any]:
    """scikit-learn's, the first 1,437 (80 %) for training."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    part = slice(0, 1437) if train else slice(1437, None)
    return pixels[part].astype("uint8").reshape(-1, 8, 8), targets[part]


def _tiny_imagenet(root: Path | None, train: bool) -> tuple[Any, Any]:
    """Training images class after class in turn, so that the first ones have all classes; the validation images stand
    for the test images, whose classes are not public."""
    import numpy as np
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


@lru_cache(maxsize=1)
def mnist(dataset_root: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(inputs, targets) for training and for testing, normalised, [N, 784]; downloaded to Avalanche's own folder where
    there is no root."""
    from avalanche.benchmarks.datasets.external_datasets.mnist import get_mnist_dataset

    train, test = get_mnist_dataset(dataset_root)
    return (
        (normalised(train.data.flatten(1), MEAN, DEVIATION), train.targets),
        (normalised(test.data.flatten(1), MEAN, DEVIATION), test.targets),
    )


def normalised(images: UInt8[Tensor, "..."], mean: float, deviation: float) -> Float[Tensor, "..."]:
    """What torchvision's `ToTensor` and `Normalize` make of images of bytes."""
    return images.float().div_(255).sub_(mean).div_(deviation)
