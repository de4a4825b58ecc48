"""The research log's sanity check: protect more directions than there are parameters, and nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

RANKS = (10, 100, 300, 500, 1000)


@dataclass(frozen=True)
class Config:
    """One rank cut on the sine stream, with the model and the training of `refresh`."""

    label: str
    rank: int
    experiences: int = 9
    steps: int = 100
    batch: int = 32
    rate: float = 1e-2
    weight_decay: float = 1e-3


class RankCut(Experiment):
    """Free dimensions, distance from each task's start and accuracy of every mini-batch, by rank."""

    name = "rank_cut"

    def configs(self, options: Options) -> Sequence[Config]:
        size = {"experiences": 3, "steps": 10} if options.quick else {}
        return [Config(f"rank {rank}", rank, **size) for rank in RANKS]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.rank_cut.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.rank_cut.report import report

        return report(results, out)


experiment = RankCut()
