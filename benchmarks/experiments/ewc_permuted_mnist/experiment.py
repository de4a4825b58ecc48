"""The rows: a path from Avalanche's setting to one that keeps ten tasks, a factor at a time, and the bounds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import DEVIATION, MEAN, check
from benchmarks.experiments.ewc_permuted_mnist.report import report
from benchmarks.harness import Experiment, Options, one_of, positive
from benchmarks.harness.errors import selected
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from avalanche_curv import Curvature, Structure
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method, Ours

MAIN, TUNE, ORIGINAL = PARTS = ("main", "tune", "original")
FIRST_TUNING_SEED = 1000
VALIDATION = 0.1  # of the training images, in tuning
PART = 0.1  # of the examples of a task, on which its curvature is estimated
THEIRS = 2.0  # our strength where Avalanche's EWC has ewc_lambda = 1, since it leaves out the ½


@dataclass(frozen=True)
class Sgd:
    """SGD without momentum."""

    rate: float

    def of(self, model: nn.Module) -> Optimizer:
        """A new optimiser of the model."""
        import torch

        return torch.optim.SGD(model.parameters(), lr=self.rate)


@dataclass(frozen=True)
class Adam:
    """Adam in one kernel, a third faster on a CPU."""

    rate: float

    def of(self, model: nn.Module) -> Optimizer:
        """A new optimiser of the model."""
        import torch

        return torch.optim.Adam(model.parameters(), lr=self.rate, fused=True)


@dataclass(frozen=True)
class Setting:
    """How is trained: `steps` steps a task with batches of `batch`, on a ReLU network with two hidden layers of
    `hidden`; pixels in [0, 1], or with Avalanche's mean taken off and its deviation divided by.

    `validation` is the part of the training images that is held out of each task and tested on in place of the test
    images, in tuning.
    """

    optimiser: Sgd | Adam
    images: str = "mnist"
    tasks: int = 10
    hidden: int = 400
    steps: int = 500
    batch: int = 128
    mean: float = 0.0
    deviation: float = 1.0
    validation: float = 0.0

    @property
    def milliseconds(self) -> float:
        """About those of a step."""
        return 1e-5 * self.batch / 128 * self.hidden * (784 + self.hidden)


SLOW = Setting(Sgd(1e-3), mean=MEAN, deviation=DEVIATION)
FAST = replace(SLOW, optimiser=Sgd(0.1))
UNSHIFTED = replace(FAST, mean=0.0, deviation=1.0)
ADAM = replace(UNSHIFTED, optimiser=Adam(1e-3))
NORMALISED = replace(FAST, optimiser=Adam(1e-3))
ORIGINALLY = replace(SLOW, hidden=1000, steps=2350, batch=256)  # ten epochs


@dataclass(frozen=True)
class Config:
    """A method in a setting. `changed` is what the row changes of the one above it, and `slowdown` about what a step
    costs in plain ones."""

    label: str
    method: Method
    setting: Setting
    changed: str = ""
    slowdown: float = 1.0
    first_seed: int = 0

    @property
    def cost(self) -> float:
        return self.slowdown * self.setting.milliseconds * self.setting.steps * self.setting.tasks


@dataclass(frozen=True)
class Row:
    """A penalised row at the strength that tuning chose, and those it tried; none for a strength that is given."""

    label: str
    changed: str
    setting: Setting
    method: Ours
    tried: tuple[float, ...] = ()
    slowdown: float = 1.2

    def config(self) -> Config:
        """The row as it is reported."""
        return Config(self.label, self.method, self.setting, self.changed, self.slowdown)

    def tuning(self) -> list[Config]:
        """The row at each strength tried, on held-out images."""
        setting = replace(self.setting, validation=VALIDATION)
        return [
            Config(
                f"{self.label} at {strength:g}", self.method.with_strength(strength), setting, self.changed,
                self.slowdown, FIRST_TUNING_SEED,
            )
            for strength in self.tried
        ]


def penalised() -> tuple[list[Row], list[Row]]:
    """The path, and the rows beside it; strengths are the best of `run ewc_permuted_mnist --part tune`."""
    from avalanche_curv import Accumulate, BatchedEmpiricalFisher, Diagonal, Fisher, Kronecker, PiWeighted
    from benchmarks.methods import Ours

    def at(strength: float, curvature: Curvature, structure: Structure) -> Ours:
        return Ours(strength, curvature, structure, Accumulate(fraction=PART))

    diagonal, kronecker = Diagonal(), Kronecker(sums=PiWeighted())
    batches, fisher = BatchedEmpiricalFisher(batch_size=128), Fisher()
    ones, tens = (1.0, 3.0, 10.0), (10.0, 30.0, 100.0)
    six = Row("6 optimiser", "Adam at 0.001, λ tuned", ADAM, at(30.0, fisher, diagonal), tens)
    path = [
        Row("1 Avalanche's recipe", "", SLOW, at(THEIRS, batches, diagonal)),
        Row("2 learning rate", "SGD at 0.1 instead of 0.001", FAST, at(THEIRS, batches, diagonal)),
        Row("3 strength", "λ tuned", FAST, at(300.0, batches, diagonal), (100.0, 300.0, 1000.0)),
        Row("4 per-example Fisher", "exact Fisher, λ tuned", FAST, at(3.0, fisher, diagonal), ones),
        Row("5 pixels", "in [0, 1], λ tuned", UNSHIFTED, at(3.0, fisher, diagonal), ones),
        six,
        Row(
            "7 Kronecker", "KFAC for the diagonal, λ tuned", ADAM, at(10.0, fisher, kronecker), (3.0, 10.0, 30.0),
            slowdown=3.0,
        ),
    ]
    wide, long = replace(ADAM, hidden=1000), replace(ADAM, steps=1000)
    aside = [
        replace(six, label="6 normalised", changed="row 6, pixels as in row 4, λ tuned", setting=NORMALISED),
        replace(six, label="6 wide", changed="row 6, 1,000 units, at its λ", setting=wide, tried=()),
        replace(six, label="6 long", changed="row 6, twice the steps, at its λ", setting=long, tried=()),
    ]
    return path, aside


def rows(part: str) -> list[Config]:
    """The grid of a part."""
    from avalanche_curv import Accumulate, BatchedEmpiricalFisher, Diagonal
    from benchmarks.methods import Multitask, Ours, Plain

    if part == ORIGINAL:
        theirs = Ours(THEIRS, BatchedEmpiricalFisher(batch_size=256), Diagonal(), Accumulate())
        return [Config("Avalanche's setting", theirs, ORIGINALLY), Config("Naive in it", Plain(), ORIGINALLY)]
    path, aside = penalised()
    if part == TUNE:
        return [config for row in (*path, *aside) for config in row.tuning()]
    return [
        Config("Naive, as row 1", Plain(), SLOW),
        *(row.config() for row in (*path, *aside)),
        Config("Naive, as row 7", Plain(), ADAM),
        Config("multitask, as row 7", Multitask(), ADAM),
    ]


@dataclass(frozen=True)
class EwcOptions(Options):
    """None leaves what each row has; `row` None is all rows of the part."""

    part: str = MAIN
    tasks: int | None = None
    row: Sequence[str] | None = None


class EwcPermutedMnist(Experiment):
    """What each factor is worth, one changed at a time, each row at a strength tuned for it."""

    name = "ewc_permuted_mnist"
    options_type = EwcOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--part", type=one_of("part", PARTS), default=MAIN,
            help="main (default); tune: strengths, on held-out images and seeds from 1000 on; original: Avalanche's",
        )
        parser.add_argument("--tasks", type=positive, metavar="N", help="default: 10")
        parser.add_argument("--row", action="append", metavar="LABEL", help="one row, by its label; repeatable")

    def variant(self, options: EwcOptions) -> str:
        return "" if options.part == MAIN else options.part

    def configs(self, options: EwcOptions) -> Sequence[Config]:
        known = {config.label: config for config in rows(options.part)}
        chosen = selected("row", known, options.row)
        return [replace(config, setting=adapted(config.setting, options)) for config in chosen]

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.ewc_permuted_mnist.run import run

        return run(config, config.first_seed + seed, context)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


def adapted(setting: Setting, options: Any) -> Setting:
    """With `quick`, a few steps on two tasks of digits that need no download. Raises UsageError where MNIST is
    absent."""
    if options.quick:
        setting = replace(setting, images="digits", tasks=2, hidden=20, steps=20)
    check(setting.images, options.dataset_root)
    return setting if options.tasks is None else replace(setting, tasks=options.tasks)


experiment = EwcPermutedMnist()
