"""The networks of the paper's appendix B; torch is imported when one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

Activation = Callable[[], "nn.Module"]


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
        from torch import nn

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
        from torchvision.models import resnet18

        return resnet18(num_classes=classes)


@dataclass(frozen=True)
class VitTiny:
    """torchvision's vision transformer in the sizes of DeiT-Ti (Touvron et al. 2021), on 8 × 8 patches of an image."""

    layers: int = 12
    heads: int = 3
    width: int = 192

    output = "heads"

    def build(self, shape: tuple[int, int, int], classes: int, activation: Activation) -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(
            image_size=shape[1], patch_size=shape[1] // 8, num_layers=self.layers, num_heads=self.heads,
            hidden_dim=self.width, mlp_dim=4 * self.width, num_classes=classes,
        )


def _outputs_per_unit(activation: nn.Module) -> int:
    """2 for the concatenated ReLU, 1 for most."""
    import torch

    return activation(torch.zeros(1, 1)).shape[1]
