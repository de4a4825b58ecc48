"""Two tasks in a row, and the errors of the first one's expansion and of its diagonal along training on the second."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from avalanche_curv import GGN, Diagonal, EmpiricalRisk, Fisher, Hessian, Matrix, MatrixFree, estimate
from benchmarks.harness.experiment import Record
from benchmarks.training import Data

if TYPE_CHECKING:
    from benchmarks.experiments.taylor.experiment import Path

BATCH = 64
GROWTH = 1.5  # from one measured step to the next


class Problem(ABC):
    """Two tasks with one criterion, and a model of the first; frozen, so that a configuration can hold it.

    All in double precision, so that the error of the expansion can be told from rounding.
    """

    @property
    @abstractmethod
    def criterion(self) -> nn.Module:
        """The loss of both tasks."""

    @abstractmethod
    def tasks(self, seed: int, dataset_root: Folder | None) -> tuple[Data, Data]:
        """The examples of both tasks."""

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

    def tasks(self, seed: int, dataset_root: Folder | None) -> tuple[Data, Data]:
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
    def images(self, seed: int, dataset_root: Folder | None) -> Data:
        """Inputs [N, pixels] and classes."""

    def tasks(self, seed: int, dataset_root: Folder | None) -> tuple[Data, Data]:
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

    def images(self, seed: int, dataset_root: Folder | None) -> Data:
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        return torch.from_numpy(pixels / 16), torch.from_numpy(targets).long()


@dataclass(frozen=True)
class MNIST(Classification):
    """A random part of the training images of MNIST, 28x28 pixels."""

    examples: int = 5000

    def images(self, seed: int, dataset_root: Folder | None) -> Data:
        from benchmarks.data import mnist
        from benchmarks.experiments.ewc_hessian.data import some

        (x, y), _ = mnist(dataset_root)
        part = some(len(y), self.examples, seed, 0)
        return x[part], y[part]


@dataclass(frozen=True)
class Expansion:
    """L_A(a + δ) ≈ L_A(a) + gᵀδ + ½ δᵀ H δ, with H exact, H's diagonal, and the GGN in its place."""

    risk: EmpiricalRisk
    value: float
    gradient: Tensor
    hessian: Matrix
    diagonal: Matrix
    ggn: Matrix

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> Expansion:
        """The expansion around the frozen parameters."""
        hessian, ggn = (estimate(kind, MatrixFree(), risk).curvature for kind in (Hessian(), GGN()))
        return cls(risk, risk.value(), risk.gradient(), hessian, estimate(Hessian(), Diagonal(), risk).curvature, ggn)

    def errors(self, model: nn.Module) -> dict[str, float]:
        """What each simplification adds at the parameters of `model`, in absolute value; the distance ‖δ‖, the increase
        that these are errors of, and ½ δᵀ diag(H) δ, which EWC predicts of it."""
        delta = self.risk.space.vector(model).to(self.risk.anchor) - self.risk.anchor
        now = EmpiricalRisk.snapshot(model, self.risk.loss, self.risk.batches).value()
        full, diagonal, ggn = (
            0.5 * float(delta @ matrix.product(delta)) for matrix in (self.hessian, self.diagonal, self.ggn)
        )
        slope, increase = float(self.gradient @ delta), now - self.value
        return {
            "distance": float(delta.norm()),
            "increase": increase,
            "predicted": diagonal,
            "taylor": abs(increase - slope - full),
            "diagonal": abs(full - diagonal),
            "slope": abs(slope),
            "ggn": abs(full - ggn),
        }


def run(path: Path, seed: int, root: Folder | None) -> Iterator[Record]:
    """Errors at steps that grow by half, of stochastic gradient descent on the second task."""
    first, second = path.problem.tasks(seed, root)
    torch.manual_seed(seed)
    model = path.problem.learned(first)
    risk = EmpiricalRisk.snapshot(model, path.problem.criterion, [first])
    expansion, past = Expansion.of(risk), estimate(Fisher(), Diagonal(), risk)
    yield {"metric": "anchor_loss", "value": expansion.value}
    yield {"metric": "anchor_gradient", "value": expansion.gradient.norm()}
    optimizer = torch.optim.SGD(model.parameters(), lr=path.rate)
    found: list[dict[str, float]] = []
    for step in range(1, path.steps + 1):
        penalty = path.strength * past.penalty(model) if path.strength else 0.0
        descend(model, path.problem.criterion, second, BATCH, optimizer, penalty)
        if step in measured_steps(path.steps):
            found.append(expansion.errors(model))
            yield from ({"metric": name, "value": value, "step": step} for name, value in found[-1].items())
    yield from crossover(found)


def crossover(found: Sequence[Mapping[str, float]]) -> Iterator[Record]:
    """Where the error of the expansion first exceeds that of the diagonal, nothing if it never does; and the share of
    the places where it does not."""
    beyond = [errors for errors in found if errors["taylor"] > errors["diagonal"]]
    yield {"metric": "dominated", "value": 1 - len(beyond) / len(found)}
    if beyond:
        yield {"metric": "crossover", "value": beyond[0]["distance"]}
        yield {"metric": "crossover_increase", "value": beyond[0]["increase"]}


def measured_steps(last: int) -> list[int]:
    """1, and each next one half larger, up to the last.

    >>> measured_steps(10)
    [1, 2, 3, 5, 8, 10]
    """
    steps = [1]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, round(GROWTH * steps[-1] + 0.1))))
    return steps


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
