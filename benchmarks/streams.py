"""The streams that experiments train on, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Stream:
    """A benchmark of `experiences` experiences, and the shape of a network with one hidden layer for it."""

    make: Callable[[int, int, Path | None], Any]
    """(experiences, seed, dataset_root) ↦ an Avalanche benchmark."""
    experiences: int
    inputs: int
    outputs: int
    hidden: int
    downloads: bool = False

    def check(self, name: str, dataset_root: Path | None) -> None:
        """Raises UsageError where the data cannot be read."""
        if self.downloads and dataset_root is not None and not (dataset_root / "MNIST" / "raw").is_dir():
            raise UsageError(
                f"stream '{name}' reads MNIST from {dataset_root / 'MNIST' / 'raw'}, which is not there. "
                "Give --dataset-root DIR with the IDX files in DIR/MNIST/raw, or leave it out to download them."
            )

    def model(self) -> nn.Module:
        """A ReLU network with one hidden layer, drawn from torch's current random state."""
        from torch import nn

        return nn.Sequential(
            nn.Flatten(), nn.Linear(self.inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.outputs)
        )


def _sine(experiences: int, seed: int, dataset_root: Path | None) -> Any:
    from avalanche_curv.streams import SineBoundary

    return SineBoundary(experiences, seed=seed)


def _permuted_digits(experiences: int, seed: int, dataset_root: Path | None) -> Any:
    from avalanche_curv.streams import PermutedDigits

    return PermutedDigits(experiences, seed=seed)


def _rotated_digits(experiences: int, seed: int, dataset_root: Path | None) -> Any:
    from avalanche_curv.streams import RotatedDigits

    return RotatedDigits(experiences, seed=seed)


def _split_digits(experiences: int, seed: int, dataset_root: Path | None) -> Any:
    from avalanche_curv.streams import SplitDigits

    return SplitDigits(experiences, seed=seed)


def _split_mnist(experiences: int, seed: int, dataset_root: Path | None) -> Any:
    from avalanche.benchmarks.classic import SplitMNIST

    return SplitMNIST(experiences, seed=seed, dataset_root=dataset_root)


def _permuted_mnist(experiences: int, seed: int, dataset_root: Path | None) -> Any:
    from avalanche.benchmarks.classic import PermutedMNIST

    return PermutedMNIST(experiences, seed=seed, dataset_root=dataset_root)


STREAMS = {
    "permuted_digits": Stream(_permuted_digits, 5, 64, 10, hidden=100),
    "rotated_digits": Stream(_rotated_digits, 5, 64, 10, hidden=100),
    "split_digits": Stream(_split_digits, 5, 64, 10, hidden=100),
    "sine": Stream(_sine, 9, 2, 2, hidden=100),
    "permuted_mnist": Stream(_permuted_mnist, 5, 784, 10, hidden=100, downloads=True),
    "split_mnist": Stream(_split_mnist, 5, 784, 10, hidden=100, downloads=True),
}
