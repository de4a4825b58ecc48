"""EWC on ten permuted MNIST tasks: from Avalanche's setting to the paper's 0.94, a factor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from avalanche_curv import (
    Accumulate,
    BatchedEmpiricalFisher,
    Curvature,
    Diagonal,
    Fisher,
    Kronecker,
    Merge,
    PiWeighted,
    Structure,
)
from avalanche_curv.core import NonFiniteCurvatureError
from benchmarks.data import ALL, CLASSES, DEVIATION, MEAN, check, read
from benchmarks.experiments.ewc_permuted_mnist.sums import TRIED, methods, price
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.harness.errors import selected
from benchmarks.harness.options import one_of, positive
from benchmarks.harness.tuning import FIRST_SEED
from benchmarks.methods import Method, Multitask, Ours, Plain
from benchmarks.networks import mlp
from benchmarks.streams.whole_batches import TensorStream, accuracy_records, permuted, plain_trainer
from benchmarks.training import Data, Trainer, mean, summary

MAIN, TUNE, ORIGINAL, SUMS, FIFTY = PARTS = ("main", "tune", "original", "sums", "fifty")
VALIDATION = 0.1  # of the training images, in tuning
PART = 0.1  # of the examples of a task, on which its curvature is estimated
THEIRS = 2.0  # our strength where Avalanche's EWC has ewc_lambda = 1, since it leaves out the ½


@dataclass(frozen=True)
class Sgd:
    """SGD without momentum."""

    rate: float

    def of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimiser of the model."""
        return torch.optim.SGD(model.parameters(), lr=self.rate)


@dataclass(frozen=True)
class Adam:
    """Adam in one kernel, a third faster on a CPU."""

    rate: float

    def of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new optimiser of the model."""
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
    def looks(self) -> int:
        """After how many tasks all of them are tested: ten times in a long stream."""
        return max(1, self.tasks // 10)

    @property
    def milliseconds(self) -> float:
        """About those of a step."""
        return 1e-5 * self.batch / 128 * self.hidden * (784 + self.hidden)


SLOW = Setting(Sgd(1e-3), mean=MEAN, deviation=DEVIATION)
FAST = replace(SLOW, optimiser=Sgd(0.1))
UNSHIFTED = replace(FAST, mean=0.0, deviation=1.0)
ADAM = replace(UNSHIFTED, optimiser=Adam(1e-3))
NORMALISED = replace(FAST, optimiser=Adam(1e-3))
LONG = replace(ADAM, tasks=50, hidden=100)
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
                self.slowdown, FIRST_SEED,
            )
            for strength in self.tried
        ]


def penalised() -> tuple[list[Row], list[Row]]:
    """The path, and the rows beside it; strengths are the best of `run ewc_permuted_mnist --part tune`."""
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


def sums() -> list[Row]:
    """Rows that differ in how sums of Kronecker factors are kept, in the setting of the last of the path."""
    return [Row(label, "", ADAM, method, TRIED, slowdown=3.0) for label, method in methods(PART).items()]


def fifty() -> list[Row]:
    """Fifty tasks, with one anchor and a curvature that takes no more memory with each of them (Ritter et al. 2018)."""
    def row(label: str, structure: Structure, strength: float, tried: tuple[float, ...], slowdown: float) -> Row:
        return Row(label, "", LONG, Ours(strength, Fisher(), structure, Merge(fraction=PART)), tried, slowdown)

    return [
        row("Kronecker, moved", Kronecker(), 3.0, (1.0, 3.0, 10.0), 3.0),
        row("diagonal, moved", Diagonal(), 3.0, (3.0, 10.0, 30.0), 1.2),
    ]


def rows(part: str) -> list[Config]:
    """The grid of a part."""
    if part == ORIGINAL:
        theirs = Ours(THEIRS, BatchedEmpiricalFisher(batch_size=256), Diagonal(), Accumulate())
        return [Config("Avalanche's setting", theirs, ORIGINALLY), Config("Naive in it", Plain(), ORIGINALLY)]
    if part == SUMS:
        return [row.config() for row in sums()]
    if part == FIFTY:
        bounds = Config("Naive", Plain(), LONG), Config("multitask", Multitask(), LONG)
        return [*(row.config() for row in fifty()), *bounds]
    path, aside = penalised()
    if part == TUNE:
        return [config for row in (*path, *aside, *sums(), *fifty()) for config in row.tuning()]
    return [
        Config("Naive, as row 1", Plain(), SLOW),
        *(row.config() for row in (*path, *aside)),
        Config("Naive, as row 7", Plain(), ADAM),
        Config("multitask, as row 7", Multitask(), ADAM),
    ]


@dataclass(frozen=True)
class EwcOptions(Options):
    """None leaves what each row has; no `row` is all of the part."""

    part: Annotated[str, one_of("part", PARTS)] = MAIN
    """tune: strengths, on held-out images and seeds from 1000 on; original: Avalanche's setting; sums: how sums of
    Kronecker factors are kept; fifty: so many tasks on a small network"""
    tasks: Annotated[int | None, positive()] = None
    """default: 10, or 50"""
    row: tuple[str, ...] = ()
    """one row, by its label; repeatable"""


class EwcPermutedMnist(Experiment):
    """What each factor is worth, one changed at a time, each row at a strength tuned for it."""

    name = "ewc_permuted_mnist"
    options_type = EwcOptions

    def variant(self, options: EwcOptions) -> str:
        return "" if options.part == MAIN else options.part

    def configs(self, options: EwcOptions) -> Sequence[Config]:
        """The rows that were asked for; with `quick`, a few steps on two tasks of digits that need no download. Raises
        UsageError for an unknown row, and where MNIST is absent."""
        change: dict[str, Any] = {"images": "digits", "tasks": 2, "steps": 20} if options.quick else {}
        change |= {"tasks": options.tasks} if options.tasks else {}
        shrunk = 20 if options.quick else 1
        known = {config.label: config for config in rows(options.part)}
        chosen = [
            replace(config, setting=replace(config.setting, hidden=config.setting.hidden // shrunk, **change))
            for config in selected("row", known, options.row or None)
        ]
        for config in chosen:
            check(config.setting.images, options.dataset_root)
        return chosen

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        """Learn one task after another; the number of tasks learned is the step of a record. Weights that diverge end
        the run, without an accuracy."""
        seed += config.first_seed
        setting, joint = config.setting, config.method.joint
        found = stream(setting, seed, context.dataset_root, at_once=joint)
        torch.manual_seed(seed)  # every row of one size starts from the same weights
        trainer = build(config, found)
        rows: list[list[float]] = []
        for experience in found.benchmark.train_stream:
            try:
                trainer.train(experience)
            except NonFiniteCurvatureError:
                yield {"metric": "average_accuracy", "value": nan}
                return
            learned = setting.tasks if joint else len(rows) + 1
            first = 0 if learned % setting.looks == 0 or learned == setting.tasks else learned - 1  # the newest alone
            row = trainer.accuracies(test.all() for test in found.tests[first:learned])
            rows.append([nan] * first + row)
            if first == 0:
                yield from accuracy_records(row, learned)
        scalars = {"average_accuracy": mean(rows[-1])} if joint else summary(rows)
        yield from ({"metric": name, "value": value} for name, value in {**scalars, "seconds": trainer.seconds}.items())
        inputs, targets = (part[: setting.batch] for part in found.parts[0].all())
        yield from price(trainer, (inputs, targets))


def stream(setting: Setting, seed: int, dataset_root: Path | None, *, at_once: bool) -> TensorStream:
    """Permutations of MNIST, or of what is left of its training images and what is held out of them."""
    train, test = (
        (part.vectors(setting.mean, setting.deviation), part.targets)
        for part in read(setting.images, ALL, 0, dataset_root)
    )
    if setting.validation:
        train, test = held_out(train, setting.validation, seed)
    return permuted(train, test, setting.tasks, seed, at_once=at_once)


def held_out(train: Data, part: float, seed: int) -> tuple[Data, Data]:
    """Training images without a random part of them, and that part."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    kept, held = order.tensor_split([len(order) - round(part * len(order))])
    return (train[0][kept], train[1][kept]), (train[0][held], train[1][held])


def build(config: Config, found: TensorStream) -> Trainer:
    """So many steps for each task; nothing is measured while it trains."""
    setting, method = config.setting, config.method
    model = mlp(found.parts[0].inputs.shape[1], setting.hidden, setting.hidden, CLASSES)
    return plain_trainer(
        found, model, setting.optimiser.of(model), method.plugins(sum(map(len, found.parts))), batch=setting.batch,
        steps=setting.steps * (setting.tasks if method.joint else 1), kind=method.strategy,
    )


experiment = EwcPermutedMnist()
