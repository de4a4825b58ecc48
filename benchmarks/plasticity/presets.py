"""The settings by name: the paper's appendix B, and two that take seconds and minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import UsageError
from benchmarks.plasticity.networks import Mlp, Network, ResNet18, VitTiny

RANDOM, PIXELS, FLIP, GROWING = CHANGES = ("random_labels", "pixel_permutation", "label_flip", "class_incremental")
MLP, RESNET = Mlp(), ResNet18()
NETWORKS: dict[str, Network] = {"mlp": MLP, "resnet18": RESNET, "vit_tiny": VitTiny()}


@dataclass(frozen=True)
class Source:
    """Where the images of a data set lie below --dataset-root, what they are, which files these are, and how many
    classes they have."""

    place: str
    what: str
    files: tuple[str, ...]
    classes: int
    channels: int = 1


KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
IDX = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in KINDS)
BALANCED = tuple(f"emnist-balanced-{part}-{kind}" for part in ("train", "test") for kind in KINDS)
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
SVHN = ("train_32x32.mat", "test_32x32.mat")
TINY = ("wnids.txt", "train", "val/images", "val/val_annotations.txt")
SOURCES = {
    "digits": Source(".", "", (), 10),
    "mnist": Source("MNIST/raw", "the four IDX files of MNIST, unpacked", IDX, 10),
    "fashion": Source("FashionMNIST/raw", "the four IDX files of Fashion-MNIST, unpacked", IDX, 10),
    "emnist": Source("EMNIST/raw", f"the IDX files {', '.join(BALANCED)}", BALANCED, 47),
    "cifar10": Source("cifar-10-batches-py", "CIFAR-10, the version for Python, unpacked", BATCHES, 10, 3),
    "cifar100": Source(
        "cifar-100-python", "CIFAR-100, the version for Python, unpacked", ("train", "test", "meta"), 100, 3
    ),
    "svhn": Source(".", f"{' and '.join(SVHN)}, the cropped digits of SVHN", SVHN, 10, 3),
    "tiny_imagenet": Source("tiny-imagenet-200", "tiny-imagenet-200.zip, unpacked", TINY, 200, 3),
}


@dataclass(frozen=True)
class Preset:
    """`images` of a data set, the first `count` of them; (epochs, tasks) for random labels, and for other changes.

    `strength` is the one of the first table. The first `validation` test images are left out, as the paper tunes on
    them.
    """

    images: str
    count: int
    batch: int
    random: tuple[int, int]
    other: tuple[int, int]
    network: Network = MLP
    strength: float = 1e-3
    validation: int = 0


PRESETS = {
    "small": Preset("digits", 640, 64, (20, 15), (20, 15), Mlp(128)),
    "mnist": Preset("mnist", 12_800, 512, (40, 50), (40, 50)),
    "fashion": Preset("fashion", 12_800, 512, (40, 50), (40, 50)),
    "emnist": Preset("emnist", 100_000, 500, (100, 50), (20, 200)),
    "cifar10": Preset("cifar10", 50_000, 250, (20, 30), (10, 100), RESNET, 1e-4, 1_000),
    "cifar100": Preset("cifar100", 50_000, 250, (20, 30), (10, 100), RESNET, 1e-4, 1_000),
    "svhn": Preset("svhn", 50_000, 500, (20, 25), (10, 100), RESNET, 1e-3, 5_000),
    "tiny_imagenet": Preset("tiny_imagenet", 100_000, 250, (20, 30), (20, 100), RESNET, 1e-4),
}


@dataclass(frozen=True)
class Setting:
    """What all methods share: Adam at `rate`, `epochs` of each of `tasks`, drawn by `change`."""

    images: str
    count: int
    batch: int
    epochs: int
    tasks: int
    network: Network
    change: str = RANDOM
    rate: float = 1e-3
    validation: int = 0

    @property
    def task_steps(self) -> int:
        """Steps in a task that has all images."""
        return self.steps(self.count)

    def steps(self, images: int) -> int:
        """Steps in a task of so many images."""
        return self.epochs * -(-images // self.batch)


def has(images: str, dataset_root: Path | None) -> bool:
    """Whether the files of a data set are there."""
    return not SOURCES[images].files if dataset_root is None else not _missing(images, dataset_root)


def check(images: str, dataset_root: Path | None) -> None:
    """Raises UsageError where a file of a data set is not there, or empty."""
    source = SOURCES[images]
    if has(images, dataset_root):
        return
    if dataset_root is None:
        raise UsageError(
            f"{images} is read from files: give --dataset-root DIR, with {source.what} in DIR/{source.place}."
        )
    raise UsageError(
        f"{_missing(images, dataset_root)[0]} is not there, or empty. Put into {dataset_root / source.place} "
        f"{source.what}; see --dataset-root."
    )


def _missing(images: str, dataset_root: Path) -> list[Path]:
    paths = [dataset_root / SOURCES[images].place / name for name in SOURCES[images].files]
    return [path for path in paths if not (any(path.iterdir()) if path.is_dir() else _has_content(path))]


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
