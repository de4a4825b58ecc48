"""Elastic weight consolidation on ten permuted MNIST tasks: from Avalanche's 0.83 to the paper's 0.94, step by step."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.plasticity.presets import check
from benchmarks.harness import Experiment, Options, one_of, positive
from benchmarks.harness.errors import selected
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

MAIN, TUNE, ORIGINAL = PARTS = ("main", "tune", "original")
FIRST_TUNING_SEED = 1000


class Optimiser(ABC):
    """How steps are taken."""

    rate: float

    @abstractmethod
    def of(self, model: nn.Module) -> Optimizer:
        """A new one."""


@dataclass(frozen=True)
class Sgd(Optimiser):
    """Without momentum."""

    rate: float

    def of(self, model: nn.Module) -> Optimizer:
        import torch

        return torch.optim.SGD(model.parameters(), lr=self.rate)


@dataclass(frozen=True)
class Adam(Optimiser):
    """In one kernel, a third faster on a CPU."""

    rate: float

    def of(self, model: nn.Module) -> Optimizer:
        import torch

        return torch.optim.Adam(model.parameters(), lr=self.rate, fused=True)


@dataclass(frozen=True)
class Setting:
    """How is trained: `steps` steps a task with batches of `batch`, on a ReLU network with two hidden layers of
    `hidden`; pixels in [0, 1], or with Avalanche's mean taken off and its deviation divided by.

    `validation` is the part of the training images that is held out of each task and tested on in place of the test
    images, in tuning.
    """

    optimiser: Optimiser
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
        from benchmarks.experiments.ewc_permuted_mnist.grid import rows

        known = {config.label: config for config in rows(options.part)}
        chosen = selected("row", known, options.row)
        return [replace(config, setting=adapted(config.setting, options)) for config in chosen]

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.ewc_permuted_mnist.run import run

        return run(config, config.first_seed + seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.ewc_permuted_mnist.report import report

        return report(results, out)


def adapted(setting: Setting, options: Any) -> Setting:
    """With `quick`, a few steps on two tasks of digits that need no download. Raises UsageError where MNIST is
    absent."""
    if options.quick:
        setting = replace(setting, images="digits", tasks=2, hidden=20, steps=20)
    check(setting.images, options.dataset_root)
    return setting if options.tasks is None else replace(setting, tasks=options.tasks)


experiment = EwcPermutedMnist()
