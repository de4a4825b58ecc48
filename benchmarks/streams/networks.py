"""The networks of the literature, without their heads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn


class Network(Protocol):
    """A kind of network; its body gives vectors of `features` to a head."""

    @property
    def features(self) -> int: ...

    def body(self) -> nn.Sequential:
        """Drawn from torch's current random state."""


@dataclass(frozen=True)
class Mlp:
    """A ReLU network with hidden layers of these widths, over flattened inputs."""

    inputs: int
    hidden: tuple[int, ...]

    @property
    def features(self) -> int:
        return self.hidden[-1]

    def body(self) -> nn.Sequential:
        from torch import nn

        layers: list[nn.Module] = [nn.Flatten()]
        for width, following in pairwise((self.inputs, *self.hidden)):
            layers += [nn.Linear(width, following), nn.ReLU()]
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class ResNet18:
    """Avalanche's `SlimResNet18` with `width` channels in its first layer (20 in Lopez-Paz & Ranzato 2017; 64 is the
    ResNet-18 of Buzzega et al. 2020) and a mean over what is left of the image, so that it takes any size."""

    width: int = 20

    @property
    def features(self) -> int:
        return 8 * self.width

    def body(self) -> nn.Sequential:
        from avalanche.models import SlimResNet18
        from torch import nn

        net = SlimResNet18(1, self.width)
        blocks = (net.layer1, net.layer2, net.layer3, net.layer4)
        return nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
