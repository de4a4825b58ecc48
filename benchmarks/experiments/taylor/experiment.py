"""Section 3 of "An Optimization View of EWC": a diagonal for the Hessian, and a quadratic for the loss."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.experiments.taylor.ratio import INPUTS, Inputs, measure
from benchmarks.experiments.taylor.report import report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.experiments.taylor.path import Problem
    from benchmarks.harness.results import Results

DIMENSIONS = (4, 16, 64, 256)
EXAMPLES_PER_DIMENSION = (0.25, 1, 4, 16, 64, 256)
FEWEST = 4  # examples: with fewer, a mean of products is far from normal


@dataclass(frozen=True)
class Ratio:
    """The Hessian of linear regressions on inputs of one kind, at sizes (M, D)."""

    label: str
    inputs: Inputs
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Path:
    """Training on the second task of a problem, by stochastic gradient descent, with the penalty of EWC (diagonal
    Fisher) at `strength`."""

    label: str
    problem: Problem
    steps: int
    rate: float
    strength: float = 0.0


class Taylor(Experiment):
    """How much of a Hessian is on its diagonal, and which approximation is worse how far from the anchor."""

    name = "taylor"

    def configs(self, options: Options) -> Sequence[Ratio | Path]:
        dimensions = DIMENSIONS[:2] if options.quick else DIMENSIONS
        grid = sizes(dimensions, EXAMPLES_PER_DIMENSION)
        ratios = [Ratio(label, inputs, grid) for label, inputs in INPUTS.items()]
        some = paths(options.dataset_root)
        return [*ratios, *([replace(path, steps=10) for path in some] if options.quick else some)]

    def run(self, config: Ratio | Path, seed: int, context: Context) -> Sequence[Record]:
        if isinstance(config, Ratio):
            return list(measure(config.inputs, config.sizes, seed))
        from benchmarks.experiments.taylor.path import run

        return list(run(config, seed, context.dataset_root))

    def report(self, results: Results, out: pathlib.Path) -> str:
        return report(results, out)


def sizes(dimensions: Sequence[int], examples_per_dimension: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Pairs (M, D).

    >>> sizes([2, 4], [1, 2])
    ((4, 2), (4, 4), (8, 4))
    """
    pairs = ((round(d * factor), d) for d in dimensions for factor in examples_per_dimension)
    return tuple((m, d) for m, d in pairs if m >= FEWEST)


def paths(dataset_root: pathlib.Path | None) -> list[Path]:
    """Linear regression and small networks; on MNIST where there is a folder that holds it."""
    from benchmarks.experiments.taylor.path import MNIST, Digits, LinearRegression

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


experiment = Taylor()
