"""The models whose curvature is priced: each a family with a small member, on which the exact matrix fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.experiments.languages.gpt import BYTES, GPT, Size

CLASSES = 10


class Family(ABC):
    """A model and its inputs and targets; frozen, so that a configuration can hold it."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A new model, of the global random state."""

    @abstractmethod
    def tiny(self) -> Family:
        """A member that passes in milliseconds."""

    @abstractmethod
    def examples(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random inputs and random targets."""


class Classifier(Family):
    """A model with ten classes and the shape of its inputs."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""

    @abstractmethod
    def tiny(self) -> Classifier: ...

    def examples(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random inputs in [0, 1] and random classes."""
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.rand(count, *self.shape, generator=generator)
        return inputs, torch.randint(CLASSES, (count,), generator=generator)


@dataclass(frozen=True)
class MLP(Classifier):
    """inputs-hidden-hidden-10 with ReLU."""

    inputs: int
    hidden: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.inputs,)

    def build(self) -> nn.Module:
        h = self.hidden
        return nn.Sequential(
            nn.Linear(self.inputs, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, CLASSES)
        )

    def tiny(self) -> MLP:
        return replace(self, hidden=min(40, self.hidden))


@dataclass(frozen=True)
class ConvNet(Classifier):
    """Two convolutions of stride 2 on one channel, a pooling by 2, then hidden-10."""

    side: int
    channels: tuple[int, int]
    hidden: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, self.side, self.side)

    def build(self) -> nn.Module:
        (a, b), left = self.channels, (self.side + 3) // 4 // 2
        return nn.Sequential(
            nn.Conv2d(1, a, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(b * left**2, self.hidden), nn.ReLU(), nn.Linear(self.hidden, CLASSES),
        )

    def tiny(self) -> ConvNet:
        return replace(self, channels=(4, 8), hidden=16)


@dataclass(frozen=True)
class ResNet18(Classifier):
    """torchvision's, untrained, on 3x32x32, with so many blocks of each width."""

    blocks: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 32, 32)

    def build(self) -> nn.Module:
        from torchvision.models.resnet import BasicBlock, ResNet

        return ResNet(BasicBlock, [self.blocks] * 4, num_classes=CLASSES)

    def tiny(self) -> FirstStage:
        return FirstStage()


@dataclass(frozen=True)
class FirstStage(Classifier):
    """The first convolution of ResNet-18 and one of its blocks of 64 channels."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 32, 32)

    def build(self) -> nn.Module:
        from torchvision.models.resnet import BasicBlock, ResNet

        whole = ResNet(BasicBlock, [1] * 4)
        return nn.Sequential(
            whole.conv1, whole.bn1, whole.relu, whole.maxpool, whole.layer1, whole.avgpool, nn.Flatten(),
            nn.Linear(64, CLASSES),
        )

    def tiny(self) -> FirstStage:
        return self


@dataclass(frozen=True)
class Transformer(Classifier):
    """torchvision's VisionTransformer on three channels."""

    side: int
    patch: int
    layers: int
    hidden: int
    mlp: int
    heads: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.side, self.side)

    def build(self) -> nn.Module:
        from torchvision.models import VisionTransformer

        return VisionTransformer(
            self.side, self.patch, self.layers, self.heads, self.hidden, self.mlp, num_classes=CLASSES
        )

    def tiny(self) -> Transformer:
        return replace(self, layers=1, hidden=8, mlp=16)


@dataclass(frozen=True)
class LanguageModel(Family):
    """The GPT over bytes of the experiment `languages`, untied, on windows of as many bytes as it can see: of each one
    the next is the target."""

    size: Size

    def build(self) -> nn.Module:
        return GPT(self.size)

    def tiny(self) -> LanguageModel:
        return LanguageModel(Size(1, 8, 2, 4))

    def examples(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Windows of random bytes, and each shifted by one."""
        generator = torch.Generator().manual_seed(seed)
        windows = torch.randint(BYTES, (count, self.size.context + 1), generator=generator)
        return windows[:, :-1], windows[:, 1:]


def digits(family: Classifier, count: int) -> tuple[Tensor, Tensor]:
    """Real digits of 8x8 pixels (scikit-learn's) in the shape of a small family's inputs."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    shape = family.shape if len(family.shape) == 1 else (1, 8, 8)
    inputs = torch.from_numpy(pixels[:count] / 16).float().view(-1, *shape)
    return inputs.expand(-1, *family.shape).clone(), torch.from_numpy(targets[:count]).long()
