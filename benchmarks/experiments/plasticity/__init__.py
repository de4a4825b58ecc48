"""Lewandowski et al. 2024: accuracy at the end of each task against its number, for every mitigator."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import SOURCES, check, has
from benchmarks.experiments.plasticity.networks import Mlp
from benchmarks.experiments.plasticity.presets import (
    CHANGES,
    NETWORKS,
    PRESETS,
    RANDOM,
    Preset,
    Setting,
)
from benchmarks.harness import Experiment, Options, UsageError, one_of, positive
from benchmarks.harness.errors import selected
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.experiments.plasticity.methods import Method
    from benchmarks.harness.results import Results

PARTS = ("methods", "strengths", "layer_norm", "epochs")
QUICK = {"count": 64, "batch": 32, "epochs": 1, "tasks": 2}


@dataclass(frozen=True)
class Config:
    """One method in one setting."""

    label: str
    method: Method
    setting: Setting

    @property
    def cost(self) -> float:
        return float(self.setting.task_steps * self.setting.tasks)


@dataclass(frozen=True)
class PlasticityOptions(Options):
    """None leaves what the preset has; `part` None is all parts, `method` None all rows of these."""

    preset: str = "small"
    change: str = RANDOM
    network: str | None = None
    tasks: int | None = None
    epochs: int | None = None
    examples: int | None = None
    part: str | None = None
    method: Sequence[str] | None = None


class Plasticity(Experiment):
    """Can a network still learn its last task as well as its first, and as well as one that begins anew?"""

    name = "plasticity"
    options_type = PlasticityOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--preset", type=one_of("preset", PRESETS), default="small", help="default: small")
        parser.add_argument("--change", type=one_of("change", CHANGES), default=RANDOM, help=f"default: {RANDOM}")
        parser.add_argument("--network", type=one_of("network", NETWORKS), help="default: that of the preset")
        parser.add_argument("--tasks", type=positive, metavar="N", help="so many tasks instead of the preset's")
        parser.add_argument("--epochs", type=positive, metavar="N", help="so many epochs of each task")
        parser.add_argument("--examples", type=positive, metavar="N", help="the first N images only")
        parser.add_argument("--part", type=one_of("part", PARTS), help="default: all")
        parser.add_argument("--method", action="append", metavar="LABEL", help="one row, by its label; repeatable")
        parser.set_defaults(seeds=3)

    def variant(self, options: PlasticityOptions) -> str:
        chosen = (options.preset, options.change if options.change != RANDOM else "", options.network or "")
        return "-".join(part for part in chosen if part)

    def configs(self, options: PlasticityOptions) -> Sequence[Config]:
        from benchmarks.experiments.plasticity.grid import rows

        parts = (options.part,) if options.part else PARTS
        strength = PRESETS[options.preset].strength
        known = {row[0]: Config(*row) for row in rows(setting_for(options), strength, parts, options.quick)}
        return selected("method", known, options.method)

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.plasticity.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.plasticity.report import report

        return report(results, out)


def setting_for(options: Any) -> Setting:
    """The setting that the options ask for. `small` takes MNIST where it is at hand, and scikit-learn's digits else."""
    preset: Preset = PRESETS[options.preset]
    images = "mnist" if options.preset == "small" and has("mnist", options.dataset_root) else preset.images
    check(images, options.dataset_root)
    network = preset.network if options.network is None else NETWORKS[options.network]
    if SOURCES[preset.images].channels == 1 and not isinstance(network, Mlp):
        raise UsageError(
            f"{options.network} is for colour images, and those of preset '{options.preset}' are grey. Take --preset "
            "cifar10, say, or leave out --network."
        )
    epochs, tasks = preset.random if options.change == RANDOM else preset.other
    setting = Setting(
        images, preset.count, preset.batch, epochs, tasks, network, options.change, validation=preset.validation
    )
    asked = {"tasks": options.tasks, "epochs": options.epochs, "count": options.examples}
    return replace(setting, **(QUICK if options.quick else {}) | {k: v for k, v in asked.items() if v is not None})


experiment = Plasticity()
