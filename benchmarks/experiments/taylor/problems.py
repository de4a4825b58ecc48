"""Two tasks in a row, and a model trained on the first: where the expansion of the first task's loss begins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


class Problem(ABC):
    """Two tasks with one criterion, and a model of the first; frozen, so that a configuration can hold it.

    All in double precision, so that the error of the expansion can be told from rounding.
    """

    @property
    @abstractmethod
    def criterion(self) -> nn.Module:
        """The loss of both."""

    @abstractmethod
    def tasks(self, seed: int, dataset_root: Path | None) -> tuple[Data, Data]:
        """The examples of both."""

    @abstractmethod
    def learned(self, first: Data) -> nn.Module:
        """A model of the first task, its start drawn from torch's current random state."""


@dataclass(frozen=True)
class LinearRegression(Problem):
    """Standard normal inputs, and targets of another linear function with noise for each task; solved exactly."""

    dimension: int = 20
    examples: int = 100
    noise: float = 0.1

    @property
    def criterion(self) -> nn.Module:
        return nn.MSELoss()

    def tasks(self, seed: int, dataset_root: Path | None) -> tuple[Data, Data]:
        generator = torch.Generator().manual_seed(seed)
        return self._task(generator), self._task(generator)

    def learned(self, first: Data) -> nn.Module:
        model = nn.Linear(self.dimension, 1, bias=False).double()
        model.weight.data = torch.linalg.lstsq(*first).solution.T
        return model

    def _task(self, generator: torch.Generator) -> Data:
        x = torch.randn(self.examples, self.dimension, generator=generator, dtype=torch.float64)
        true = torch.randn(self.dimension, 1, generator=generator, dtype=torch.float64)
        return x, x @ true + self.noise * torch.randn(self.examples, 1, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Classification(Problem, ABC):
    """Images under two permutations of their pixels, and a network with one hidden layer, trained with Adam.

    `activation` is the name of a module of torch.
    """

    activation: str
    hidden: int
    steps: int = 300
    rate: float = 3e-3
    batch: int = 64

    @property
    def criterion(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    @abstractmethod
    def images(self, seed: int, dataset_root: Path | None) -> Data:
        """Inputs [N, pixels] and classes."""

    def tasks(self, seed: int, dataset_root: Path | None) -> tuple[Data, Data]:
        x, y = self.images(seed, dataset_root)
        generator = torch.Generator().manual_seed(seed)
        first, second = (x[:, torch.randperm(x.shape[1], generator=generator)].double() for _ in range(2))
        return (first, y), (second, y)

    def learned(self, first: Data) -> nn.Module:
        x, _ = first
        activation = getattr(nn, self.activation)()
        model = nn.Sequential(nn.Linear(x.shape[1], self.hidden), activation, nn.Linear(self.hidden, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)
        for _ in range(self.steps):
            descend(model, self.criterion, first, self.batch, optimizer)
        return model


@dataclass(frozen=True)
class Digits(Classification):
    """scikit-learn's 1,797 images of 8x8 pixels."""

    def images(self, seed: int, dataset_root: Path | None) -> Data:
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        return torch.from_numpy(pixels / 16), torch.from_numpy(targets).long()


@dataclass(frozen=True)
class MNIST(Classification):
    """A random part of the training images of MNIST, 28x28 pixels."""

    examples: int = 5000

    def images(self, seed: int, dataset_root: Path | None) -> Data:
        from benchmarks.experiments.ewc_hessian.data import mnist, some

        (x, y), _ = mnist(dataset_root)
        part = some(len(y), self.examples, seed, 0)
        return x[part], y[part]


def descend(
    model: nn.Module, criterion: nn.Module, data: Data, batch: int, optimizer: torch.optim.Optimizer,
    penalty: Tensor | float = 0.0,
) -> None:
    """One step on a random batch."""
    x, y = data
    chosen = torch.randint(len(y), (min(batch, len(y)),))
    optimizer.zero_grad()
    (criterion(model(x[chosen]), y[chosen]) + penalty).backward()
    optimizer.step()
