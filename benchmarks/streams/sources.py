"""The data sets that are read from files: where they lie below --dataset-root, and what to put there."""

from __future__ import annotations

from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from pickle import PickleError
from zipfile import BadZipFile

from benchmarks.harness.errors import UsageError

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
