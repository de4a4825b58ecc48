"""Three sources of error of a quadratic picture: how stale it is, which curvature it takes, which way training goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Curvature, Policy, Structure
    from benchmarks.harness.results import Results

TRAJECTORIES = ("sequential", "replay", "regularised")


@dataclass(frozen=True)
class Setting:
    """The research log's stream, model and training; `memory` of each task's examples are stored, and all that is known
    of the past is estimated on them."""

    experiences: int = 9
    steps: int = 100
    batch: int = 32
    rate: float = 1e-2
    weight_decay: float = 1e-3
    memory: float = 0.1
    every: int = 10


@dataclass(frozen=True)
class Picture:
    """One way to keep a quadratic model of the past."""

    policy_name: str
    kind_name: str
    structure_name: str
    policy: Policy
    curvature: Curvature
    structure: Structure

    @property
    def name(self) -> str:
        return f"{self.policy_name}, {self.kind_name}, {self.structure_name}"


@dataclass(frozen=True)
class Config:
    """One trajectory and the pictures that are measured along it; a regularised one is that of its only picture."""

    label: str
    trajectory: str
    pictures: tuple[Picture, ...]
    setting: Setting
    strength: float = 1.0

    @property
    def cost(self) -> float:
        return float(len(self.pictures))


class Sources(Experiment):
    """|L − q| of the stored examples along each trajectory, for every policy, curvature and structure."""

    name = "sources"

    def configs(self, options: Options) -> Sequence[Config]:
        from benchmarks.experiments.sources.grid import configs

        return configs(options.quick)

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.sources.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.sources.report import report

        return report(results, out)


experiment = Sources()
