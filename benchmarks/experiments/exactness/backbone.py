"""The last block of the pretrained network, trained with a head behind it."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from benchmarks.data import Images
from benchmarks.experiments.exactness.learner import Network
from benchmarks.streams.features import efficientnet, seen

CHANNELS, STRIDE, FEATURES = 192, 32, 1280
"""What the last block is given for so many pixels a side, and what it ends in."""


@dataclass(frozen=True)
class BeforeTheLastBlock:
    """What the last block of EfficientNet-Lite0 is given: 192 maps of side/32 x side/32 places, one after another."""

    side: int = 64

    @property
    def width(self) -> int:
        return CHANNELS * (self.side // STRIDE) ** 2

    def of(self, images: Images) -> Float[Tensor, "N width"]:
        network = efficientnet()

        def before(x: Tensor) -> Tensor:
            x = network._swish(network._bn0(network._conv_stem(x)))
            for block in network._blocks[:-1]:
                x = block(x)
            return x.flatten(1)

        return seen(images, self.side, before)


@dataclass(frozen=True)
class Unfrozen(Network):
    """A linear layer behind the last block and the last convolution of EfficientNet-Lite0, which start as trained on
    ImageNet. BatchNorm is a part of the convolutions, with its statistics as they are; the depthwise convolution, which
    has no Kronecker factors, stays frozen."""

    @property
    def linear(self) -> bool:
        return False

    def layers(self, inputs: int, outputs: int) -> list[nn.Module]:
        side = isqrt(inputs // CHANNELS)
        return [nn.Unflatten(1, (CHANNELS, side, side)), *last_block(), nn.Linear(FEATURES, outputs)]


def last_block() -> list[nn.Module]:
    """From the maps that `BeforeTheLastBlock` has in a row to the features of `Pretrained`."""
    network = efficientnet()
    block = network._blocks[-1]
    return [
        _with_norm(block._expand_conv, block._bn0), nn.ReLU6(),
        _with_norm(block._depthwise_conv, block._bn1).requires_grad_(False), nn.ReLU6(),
        _with_norm(block._project_conv, block._bn2),
        _with_norm(network._conv_head, network._bn1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ]  # fmt: skip


def _with_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution and the BatchNorm after it, in eval mode, as one convolution."""
    size = convolution.kernel_size[0]
    made = nn.utils.skip_init(
        nn.Conv2d, convolution.in_channels, convolution.out_channels, size, padding=size // 2, groups=convolution.groups
    )
    fused = fuse_conv_bn_eval(convolution, norm)
    made.weight, made.bias = fused.weight, fused.bias
    return made
