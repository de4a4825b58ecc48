"""Accuracy against the number of refreshes: from one at each task's end to replay, with the same stored examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Experiment, Options, UsageError, one_of
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method


@dataclass(frozen=True)
class Setting:
    """What all methods share on a stream: Adam at `rate`, `steps` steps an experience, and the part of its examples
    that is stored."""

    stream: str
    experiences: int
    steps: int
    batch: int
    rate: float
    memory: float
    cosine: bool = False
    weight_decay: float = 0.0
    mnist: bool = False


@dataclass(frozen=True)
class Config:
    """One method on one stream."""

    label: str
    method: Method
    setting: Setting

    @property
    def cost(self) -> float:
        return 5.0 if self.setting.mnist else 1.0


@dataclass(frozen=True)
class TrustRegionOptions(Options):
    """`stream` is one of `SETTINGS`, or None for all that can be had."""

    stream: str | None = None


SETTINGS = {
    setting.stream: setting
    for setting in (
        Setting("sine", 9, 100, 32, 1e-2, memory=0.1, cosine=True, weight_decay=1e-3),
        Setting("split_digits", 5, 100, 64, 1e-3, memory=40 / 288),
        Setting("permuted_digits", 5, 60, 64, 3e-3, memory=0.1),
        Setting("split_mnist", 5, 300, 64, 1e-3, memory=1 / 300, mnist=True),
        Setting("split_mnist_domain", 5, 300, 64, 1e-3, memory=1 / 300, mnist=True),
    )
}


class TrustRegion(Experiment):
    """Final accuracy on all tasks, refreshes in each task, and the price of both."""

    name = "trust_region"
    options_type = TrustRegionOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stream", type=one_of("stream", SETTINGS), help="default: all, MNIST with --dataset-root")
        parser.set_defaults(seeds=10)

    def variant(self, options: TrustRegionOptions) -> str:
        return options.stream or ""

    def configs(self, options: TrustRegionOptions) -> Sequence[Config]:
        from benchmarks.experiments.trust_region.grid import methods

        return [
            Config(f"{setting.stream}, {name}", method, setting)
            for setting in settings(options)
            for name, method in methods(setting, options.quick).items()
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.trust_region.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.trust_region.report import report

        return report(results, out)


def settings(options: Any) -> list[Setting]:
    """The streams asked for; with `quick`, two experiences of a few steps on those that need no download."""
    known = [SETTINGS[options.stream]] if options.stream else list(SETTINGS.values())
    if options.stream and known[0].mnist and options.dataset_root is None:
        raise UsageError(f"stream '{options.stream}' reads MNIST: give --dataset-root DIR.")
    chosen = [s for s in known if options.dataset_root is not None or not s.mnist]
    if options.quick:
        return [replace(setting, experiences=2, steps=10) for setting in chosen]
    return chosen


experiment = TrustRegion()
