"""Five ways to compute the Fisher information, each across strengths: the best λ differ by orders of magnitude.

The comparison of van de Ven, "On the computation of the Fisher information in continual learning" (2025), on split
MNIST with task labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.plasticity.presets import check
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Curvature
    from benchmarks.harness.results import Results

EXACT, NAIVE = "exact", "Naive"
COMMON = 1e4  # a strength at which every estimator is tried


@dataclass(frozen=True)
class Setting:
    """What all estimators share: two digits a task, told apart by a head of their own, `steps` steps of Adam at `rate`
    a task, on a ReLU network with two hidden layers of `hidden`."""

    images: str = "mnist"
    tasks: int = 5
    hidden: int = 400
    steps: int = 2000
    batch: int = 128
    rate: float = 1e-3


@dataclass(frozen=True)
class Estimator:
    """A kind of curvature, of so many random `examples` of each task; None for all."""

    curvature: Curvature
    examples: int | None = None


@dataclass(frozen=True)
class Config:
    """One estimator at a strength; Naive has neither."""

    label: str
    name: str
    setting: Setting
    estimator: Estimator | None = None
    strength: float | None = None


class FisherEstimators(Experiment):
    """Average accuracy of online EWC for each estimator at each strength."""

    name = "fisher_estimators"

    def configs(self, options: Options) -> Sequence[Config]:
        from benchmarks.experiments.fisher_estimators.grid import rows

        return rows(setting_for(options), options.quick)

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.fisher_estimators.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.fisher_estimators.report import report

        return report(results, out)


def setting_for(options: Any) -> Setting:
    """With `quick`, a few steps on two pairs of digits that need no download. Raises UsageError where MNIST is
    absent."""
    setting = Setting("digits", tasks=2, hidden=20, steps=30) if options.quick else Setting()
    check(setting.images, options.dataset_root)
    return setting


experiment = FisherEstimators()
