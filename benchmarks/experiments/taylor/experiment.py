"""How far a diagonal stands for the Hessian and a quadratic model for the loss: which error is larger, and where.

Section 3 of "An Optimization View of EWC": two tasks in a row, and the errors of the first one's expansion and of its
diagonal along training on the second; and how much of the Hessian of a linear regression lies on its diagonal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as Folder

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from avalanche_curv import GGN, Diagonal, EmpiricalRisk, Fisher, Hessian, Matrix, MatrixFree, estimate
from benchmarks.data import mnist
from benchmarks.experiments.ewc_hessian.experiment import some
from benchmarks.experiments.taylor.ratio import INPUTS, Inputs, measure
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.streams import STREAMS
from benchmarks.training import Data

DIMENSIONS = (4, 16, 64, 256)
EXAMPLES_PER_DIMENSION = (0.25, 1, 4, 16, 64, 256)
FEWEST = 4  # examples: with fewer, a mean of products is far from normal
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
        pixels, targets = load_digits(return_X_y=True)
        return torch.from_numpy(pixels / 16), torch.from_numpy(targets).long()


@dataclass(frozen=True)
class MNIST(Classification):
    """A random part of the training images of MNIST, 28x28 pixels."""

    examples: int = 5000

    def images(self, seed: int, dataset_root: Folder | None) -> Data:
        (x, y), _ = mnist(dataset_root)
        part = some(len(y), self.examples, seed, 0)
        return x[part], y[part]


@dataclass(frozen=True)
class Ratio:
    """The Hessian of linear regressions on inputs of one kind, at sizes (M, D)."""

    label: str
    inputs: Inputs
    sizes: tuple[tuple[int, int], ...]
    assumption: int = 2  # of the note, that is measured


@dataclass(frozen=True)
class Path:
    """Training on the second task of a problem, by stochastic gradient descent, with the penalty of EWC (diagonal
    Fisher) at `strength`."""

    label: str
    problem: Problem
    steps: int
    rate: float
    strength: float = 0.0
    assumption: int = 1


class Taylor(Experiment):
    """How much of a Hessian is on its diagonal, and which approximation is worse how far from the anchor."""

    name = "taylor"

    def configs(self, options: Options) -> Sequence[Ratio | Path]:
        dimensions = DIMENSIONS[:2] if options.quick else DIMENSIONS
        grid = sizes(dimensions, EXAMPLES_PER_DIMENSION)
        ratios = [Ratio(label, inputs, grid) for label, inputs in INPUTS.items()]
        some = paths(options.dataset_root)
        return [*ratios, *([replace(path, steps=10) for path in some] if options.quick else some)]

    def run(self, config: Ratio | Path, seed: int, context: Context) -> Iterator[Record]:
        if isinstance(config, Ratio):
            return measure(config.inputs, config.sizes, seed)
        return along(config, seed, context.dataset_root)


def sizes(dimensions: Sequence[int], examples_per_dimension: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Pairs (M, D).

    >>> sizes([2, 4], [1, 2])
    ((4, 2), (4, 4), (8, 4))
    """
    pairs = ((round(d * factor), d) for d in dimensions for factor in examples_per_dimension)
    return tuple((m, d) for m, d in pairs if m >= FEWEST)


def paths(dataset_root: Folder | None) -> list[Path]:
    """Linear regression and small networks; on MNIST where there is a folder that holds it."""
    found = [Path("linear regression", LinearRegression(), steps=300, rate=0.01)]
    problems: dict[str, Problem] = {
        "digits, ReLU": Digits("ReLU", hidden=16),
        "digits, tanh": Digits("Tanh", hidden=16),
    }
    if dataset_root is not None:
        STREAMS["permuted_mnist"].check(dataset_root)
        problems |= {"MNIST, ReLU": MNIST("ReLU", hidden=100), "MNIST, tanh": MNIST("Tanh", hidden=100)}
    for label, problem in problems.items():
        found.append(Path(label, problem, steps=3000, rate=0.1))
        found.append(Path(f"{label}, with EWC", problem, steps=3000, rate=0.1, strength=10.0))
    return found


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


def along(path: Path, seed: int, root: Folder | None) -> Iterator[Record]:
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


experiment = Taylor()
