"""The rows: the family of gradient projection memory, what penalises or replays instead, and the bounds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import PIXELS, check
from benchmarks.experiments.projections.report import report
from benchmarks.harness import Experiment, Options, one_of, positive
from benchmarks.harness.errors import selected
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Projection
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method, Projected

MAIN, WIDE, TUNE = PARTS = ("main", "wide", "tune")
EWC, CURVATURE_EWC = "Avalanche's EWC", "CurvatureEWC"
REPLAYED = 1000  # examples in the memory of replay
MOMENTUM = 0.9
RANK = {MAIN: 20, WIDE: 100, TUNE: 20}
STRENGTHS = {EWC: 30.0, CURVATURE_EWC: 3.0}  # `run projections --part tune --tasks 5 --epochs 1`
GRIDS = {EWC: (10.0, 30.0, 100.0, 300.0, 1000.0), CURVATURE_EWC: (1.0, 3.0, 10.0, 30.0, 100.0)}
FIRST_TUNING_SEED = 1000


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


def rows(setting: Setting, part: str, rank: int | None) -> list[Config]:
    """The grid of a part."""
    from avalanche_curv import Eigenspace, Fisher, GradientProjection, OutputGradient, PerLayer, Rank, StepProjection
    from benchmarks.methods import Multitask, Plain, Projected, Rehearsal

    if part == TUNE:
        return [
            Config(f"{name} at {strength:g}", penalised(name, strength), setting, first_seed=FIRST_TUNING_SEED)
            for name, grid in GRIDS.items() for strength in grid
        ]
    k = RANK[part] if rank is None else rank
    read = 0.7 + 0.03 * k * (setting.tasks - 1) / 2  # milliseconds: a flat basis is read twice in a step
    found = [
        Config("Naive", Plain(), setting),
        Config("GPM", gpm(StepProjection()), setting, 2.5),
        Config(f"eigenspace, flat, {k}", Projected(Eigenspace(Fisher(), Rank(k))), setting, read),
        Config(f"eigenspace, per layer, {k}", Projected(Eigenspace(Fisher(), Rank(k), PerLayer())), setting, read),
        Config(f"OGD, {k}", Projected(Eigenspace(OutputGradient(), Rank(k), examples=k)), setting, read),
    ]
    if part == WIDE:
        return found
    moving = replace(setting, momentum=MOMENTUM, rate=setting.rate * (1 - MOMENTUM))
    return [
        *found,
        *(Config(name, penalised(name, strength), setting, 1.0) for name, strength in STRENGTHS.items()),
        Config(f"replay, {REPLAYED}", Rehearsal(REPLAYED / (setting.tasks * setting.examples)), setting, 1.4),
        Config("GPM, momentum, gradient", gpm(GradientProjection()), moving, 2.5),
        Config("GPM, momentum, step", gpm(StepProjection()), moving, 2.5),
        Config("multitask", Multitask(), setting),
    ]


def gpm(projection: Projection) -> Projected:
    """Gradient projection memory with the paper's thresholds, 0.95 for the first layer and 0.99 for the others, and 300
    examples of each task."""
    from avalanche_curv import Energy, InputSpace
    from benchmarks.methods import Projected

    return Projected(InputSpace((Energy(0.95, PIXELS), Energy(0.99, PIXELS)), examples=300), projection)


def penalised(name: str, strength: float) -> Method:
    """A kind of elastic weight consolidation at a strength."""
    from avalanche_curv import Accumulate, Diagonal, Fisher
    from benchmarks.methods import AvalancheEWC, Ours

    return AvalancheEWC(strength) if name == EWC else Ours(strength, Fisher(), Diagonal(), Accumulate())


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
    """What each choice of protected directions keeps of the past, and what it leaves to learn."""

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
        known = {config.label: config for config in rows(setting_for(options), options.part, options.rank)}
        return selected("method", known, options.method)

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.projections.run import run

        return run(config, config.first_seed + seed, context)

    def report(self, results: Results, out: Path) -> str:
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
