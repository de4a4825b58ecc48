"""The settings by name: the paper's appendix B, and two that take seconds and minutes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.experiments.plasticity.networks import Mlp, Network, ResNet18, VitTiny

RANDOM, PIXELS, FLIP, GROWING = CHANGES = ("random_labels", "pixel_permutation", "label_flip", "class_incremental")
MLP, RESNET = Mlp(), ResNet18()
NETWORKS: dict[str, Network] = {"mlp": MLP, "resnet18": RESNET, "vit_tiny": VitTiny()}


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
