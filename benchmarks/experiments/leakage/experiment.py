"""Subspaces at prescribed angles, and optimisers with what of them is projected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.leakage.report import report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Projection
    from benchmarks.experiments.leakage.run import Optimiser
    from benchmarks.harness.results import Results

COSINES = (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
TASKS = (2, 3, 5, 10, 20)
QUICK = ("SGD", "momentum, stale")


@dataclass(frozen=True)
class Subspaces:
    """Subspaces of `rank` dimensions in R^`dimension`, of which any two are at principal angles of one cosine."""

    label: str
    cosine: float
    tasks: tuple[int, ...] = TASKS
    dimension: int = 500
    rank: int = 10
    draws: int = 1000


@dataclass(frozen=True)
class Training:
    """An optimiser, by its name in the table, and what of it is projected, on permuted digits."""

    label: str
    name: str
    optimiser: Optimiser
    projection: Projection
    tasks: int = 3
    steps: int = 200
    batch: int = 32
    rank: int = 20
    examples: int = 100

    @property
    def cost(self) -> float:
        return 10.0


class Leakage(Experiment):
    """‖U Δ‖ / ‖Δ‖ of random steps, and of what a network has moved in training."""

    name = "leakage"

    def configs(self, options: Options) -> Sequence[Subspaces | Training]:
        from benchmarks.experiments.leakage.run import OPTIMISERS, PROJECTIONS

        random = [Subspaces(f"cosine {c:g}", c, TASKS[:2] if options.quick else TASKS) for c in COSINES]
        size = {"steps": 10} if options.quick else {}
        trained = [
            Training(f"{name}, {kind}", name, OPTIMISERS[name], projection, **size)
            for name in (QUICK if options.quick else OPTIMISERS)
            for kind, projection in PROJECTIONS.items()
        ]
        return [*random, *trained]

    def run(self, config: Subspaces | Training, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.leakage.run import drawn, trained

        return list(drawn(config, seed)) if isinstance(config, Subspaces) else trained(config, seed)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


experiment = Leakage()
