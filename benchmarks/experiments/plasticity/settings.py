"""The settings by name: networks and presets of the paper's appendix B, and two presets of seconds and minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

Activation = Callable[[], nn.Module]


class Network(Protocol):
    """A recipe; `output` names the last layer."""

    @property
    def output(self) -> str: ...

    def build(self, shape: tuple[int, int, int], classes: int, activation: Activation) -> nn.Module:
        """With weights drawn from torch's current random state, for images [C, H, W]."""
        ...


@dataclass(frozen=True)
class Mlp:
    """`depth` hidden layers of `width`; with `LayerNorm` it stands between each and its nonlinearity."""

    width: int = 256
    depth: int = 4
    layer_norm: bool = False

    output = "output"

    def build(self, shape: tuple[int, int, int], classes: int, activation: Activation) -> nn.Module:
        model = nn.Sequential()
        model.add_module("flatten", nn.Flatten())
        inputs = shape[0] * shape[1] * shape[2]
        for layer in range(1, self.depth + 1):
            model.add_module(f"hidden{layer}", nn.Linear(inputs, self.width))
            if self.layer_norm:
                model.add_module(f"norm{layer}", nn.LayerNorm(self.width))
            model.add_module(f"activation{layer}", activation())
            inputs = self.width * _outputs_per_unit(activation())
        model.add_module(self.output, nn.Linear(inputs, classes))
        return model


@dataclass(frozen=True)
class ResNet18:
    """torchvision's, with its batch norm (He et al. 2016)."""

    output = "fc"

    def build(self, shape: tuple[int, int, int], classes: int, activation: Activation) -> nn.Module:
        return resnet18(num_classes=classes)


@dataclass(frozen=True)
class VitTiny:
    """torchvision's vision transformer in the sizes of DeiT-Ti (Touvron et al. 2021), on 8 × 8 patches of an image."""

    layers: int = 12
    heads: int = 3
    width: int = 192

    output = "heads"

    def build(self, shape: tuple[int, int, int], classes: int, activation: Activation) -> nn.Module:
        return VisionTransformer(
            image_size=shape[1], patch_size=shape[1] // 8, num_layers=self.layers, num_heads=self.heads,
            hidden_dim=self.width, mlp_dim=4 * self.width, num_classes=classes,
        )


def _outputs_per_unit(activation: nn.Module) -> int:
    """2 for the concatenated ReLU, 1 for most."""
    return activation(torch.zeros(1, 1)).shape[1]


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
