"""What each curvature costs and how near it comes to the exact one, beside the tools that a user would pick instead."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Curvature, Structure
    from benchmarks.experiments.cost.models import Family
    from benchmarks.harness.results import Results


@dataclass(frozen=True)
class Work:
    """One row: a kind in a structure, built from the first `examples` (None for all)."""

    name: str
    curvature: Curvature
    structure: Structure
    examples: int | None = None


@dataclass(frozen=True)
class Config:
    """One model. Times are medians over `rounds`; steps are timed with the past of each number in `pasts`; accuracy is
    that on `small`. `peers` name the installed ones with their versions, so that installing one asks for a new run;
    they see the first `peer_examples`, since many of them are slow."""

    label: str
    model: Family
    small: Family | None
    works: tuple[Work, ...]
    peers: tuple[str, ...] = ()
    examples: int = 10_000
    peer_examples: int = 1000
    batch: int = 128
    rounds: int = 5
    steps: int = 12
    pasts: tuple[int, ...] = (1, 5)
    cost: float = 1.0


class Cost(Experiment):
    """Build time in gradient passes, step time in steps of Naive, bytes, and distance from the exact matrix."""

    name = "cost"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(seeds=1, jobs=1)  # each seed repeats the measurement; a second worker would disturb it

    def configs(self, options: Options) -> Sequence[Config]:
        from benchmarks.experiments.cost.grid import grid

        return [_quick(config) for config in grid()] if options.quick else grid()

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        from benchmarks.experiments.cost.run import run

        return run(config)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.cost.report import report

        return report(results)


def _quick(config: Config) -> Config:
    """Every row on tiny models and few examples."""
    works = tuple(replace(work, examples=work.examples and 32) for work in config.works)
    tiny = replace(config, model=config.model.tiny(), works=works, rounds=1)
    if config.model.large:
        return replace(tiny, examples=16, peer_examples=16, batch=8, steps=2)
    return replace(tiny, examples=256, peer_examples=64, batch=32, steps=3)


experiment = Cost()
