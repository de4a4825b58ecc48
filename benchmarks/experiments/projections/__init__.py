"""Ten permuted MNIST tasks in the setting of gradient projection memory (Saha et al. 2021), with its family."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.plasticity.presets import check
from benchmarks.harness import Experiment, Options, one_of, positive
from benchmarks.harness.errors import selected
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

MAIN, WIDE, TUNE = PARTS = ("main", "wide", "tune")


@dataclass(frozen=True)
class Setting:
    """What all methods share: `tasks` permutations of the first `examples` training images, `epochs` of each in batches
    of `batch`, by SGD at `rate`, on a network with two hidden layers of `hidden` without biases."""

    images: str = "mnist"
    tasks: int = 10
    examples: int = 60_000
    epochs: int = 5
    batch: int = 10
    rate: float = 0.01
    momentum: float = 0.0
    hidden: int = 100

    @property
    def steps(self) -> int:
        """Those of all tasks."""
        return self.tasks * self.epochs * -(-self.examples // self.batch)


@dataclass(frozen=True)
class Config:
    """One method; `first_seed` sets tuning apart from what is reported, and `milliseconds` are about those of a step,
    by which the costly rows start first."""

    label: str
    method: Method
    setting: Setting
    milliseconds: float = 0.7
    first_seed: int = 0

    @property
    def cost(self) -> float:
        return self.milliseconds * self.setting.steps


@dataclass(frozen=True)
class ProjectionsOptions(Options):
    """None leaves what the setting has; `method` None is all rows of the part."""

    part: str = MAIN
    tasks: int | None = None
    epochs: int | None = None
    examples: int | None = None
    rank: int | None = None
    method: Sequence[str] | None = None


class Projections(Experiment):
    """What each way to choose protected directions keeps of the past, and what it leaves to learn."""

    name = "projections"
    options_type = ProjectionsOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--part", type=one_of("part", PARTS), default=MAIN,
            help="main (default); wide: more directions a task, one epoch; tune: strengths, on seeds from 1000 on",
        )
        parser.add_argument("--tasks", type=positive, metavar="N", help="default: 10")
        parser.add_argument("--epochs", type=positive, metavar="N", help="of each task (default: 5; 1 for wide)")
        parser.add_argument("--examples", type=positive, metavar="N", help="training images of a task (default: all)")
        parser.add_argument("--rank", type=positive, metavar="K", help="directions a task (default: 20; 100 for wide)")
        parser.add_argument("--method", action="append", metavar="LABEL", help="one row, by its label; repeatable")
        parser.set_defaults(seeds=1)

    def variant(self, options: ProjectionsOptions) -> str:
        return "" if options.part == MAIN else options.part

    def configs(self, options: ProjectionsOptions) -> Sequence[Config]:
        from benchmarks.experiments.projections.grid import rows

        known = {config.label: config for config in rows(setting_for(options), options.part, options.rank)}
        return selected("method", known, options.method)

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.projections.run import run

        return run(config, config.first_seed + seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.projections.report import report

        return report(results, out)


def setting_for(options: Any) -> Setting:
    """The setting that the options ask for; with `quick`, two tasks of a few digits that need no download. Raises
    UsageError where MNIST is absent."""
    setting = Setting(epochs=1 if options.part == WIDE else 5)
    if options.quick:
        setting = Setting("digits", tasks=2, examples=400, hidden=20)
    check(setting.images, options.dataset_root)
    asked = {"tasks": options.tasks, "epochs": options.epochs, "examples": options.examples}
    return replace(setting, **{name: value for name, value in asked.items() if value is not None})


experiment = Projections()
