"""A penalty on a subspace against a projection out of it: accuracy on the past and on the present."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

RANKS = (5, 20, 50, 100)
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
NAIVE, HARD, FLAT, TRUE = "Naive", "hard", "soft, flat", "soft, true"


@dataclass(frozen=True)
class Setting:
    """What all methods share on a stream: Adam at `rate`, `steps` steps a task, and the number of examples of each task
    whose Fisher gives the subspace, None for all."""

    stream: str
    outputs: int
    steps: int
    rate: float
    examples: int | None
    experiences: int = 5
    batch: int = 64


@dataclass(frozen=True)
class Config:
    """One method on one stream; Naive has neither rank nor strength, the projection no strength."""

    label: str
    method: str
    setting: Setting
    rank: int | None = None
    strength: float | None = None


SETTINGS = (
    Setting("permuted_digits", 10, steps=60, rate=3e-3, examples=144),
    Setting("split_digits_domain", 2, steps=100, rate=1e-3, examples=None),
)


class SoftHard(Experiment):
    """Each rank with the projection, and with both penalties at every strength."""

    name = "soft_hard"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(seeds=3)

    def configs(self, options: Options) -> Sequence[Config]:
        if options.quick:
            settings = [replace(setting, experiences=2, steps=10, examples=50) for setting in SETTINGS]
            return [config for setting in settings for config in rows(setting, RANKS[:1], STRENGTHS[2:4])]
        return [config for setting in SETTINGS for config in rows(setting, RANKS, STRENGTHS)]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.soft_hard.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.soft_hard.report import report

        return report(results, out)


def rows(setting: Setting, ranks: Sequence[int], strengths: Sequence[float]) -> list[Config]:
    """All methods on a stream."""
    found = [Config(f"{setting.stream}, {NAIVE}", NAIVE, setting)]
    for rank in ranks:
        name = f"{setting.stream}, rank {rank}"
        found.append(Config(f"{name}, {HARD}", HARD, setting, rank))
        found += [
            Config(f"{name}, {soft}, {strength:g}", soft, setting, rank, strength)
            for soft in (FLAT, TRUE)
            for strength in strengths
        ]
    return found


experiment = SoftHard()
