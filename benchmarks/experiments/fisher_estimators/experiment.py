"""The estimators, and for each the strengths around those at which it works.

The comparison of van de Ven, "On the computation of the Fisher information in continual learning" (2025), on split
MNIST with task labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data import check
from benchmarks.experiments.fisher_estimators.report import EXACT, NAIVE, report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Curvature
    from benchmarks.harness.results import Results

EXPONENTS = {  # of ten: where accuracy rises, decade by decade, its plateau, and `report.COMMON`
    EXACT: (2, 3, 4, 5, 6),
    "exact, 500 examples": (2, 3, 4, 5),
    "one sampled label": (4, 5, 6, 7, 9),
    "empirical": (4, 5, 6, 7, 9),
    "batches of 128": (4, 6, 7, 8, 10),
}


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


def estimators() -> dict[str, Estimator]:
    """Those that are compared, by name."""
    from avalanche_curv import BatchedEmpiricalFisher, EmpiricalFisher, Fisher

    return {
        EXACT: Estimator(Fisher()),
        "exact, 500 examples": Estimator(Fisher(), examples=500),
        "one sampled label": Estimator(Fisher(samples=1, seed=0)),
        "empirical": Estimator(EmpiricalFisher()),
        "batches of 128": Estimator(BatchedEmpiricalFisher(batch_size=128)),
    }


def rows(setting: Setting, quick: bool) -> list[Config]:
    """Naive, and each estimator at every strength of its range, at two of them with `quick`."""
    found = [Config(NAIVE, NAIVE, setting)]
    for name, estimator in estimators().items():
        for exponent in EXPONENTS[name][-2:] if quick else EXPONENTS[name]:
            found.append(Config(f"{name}, 1e{exponent}", name, setting, estimator, 10.0**exponent))
    return found


class FisherEstimators(Experiment):
    """Average accuracy of online EWC for each estimator at each strength."""

    name = "fisher_estimators"

    def configs(self, options: Options) -> Sequence[Config]:
        return rows(setting_for(options), options.quick)

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.fisher_estimators.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


def setting_for(options: Any) -> Setting:
    """With `quick`, a few steps on two pairs of digits that need no download. Raises UsageError where MNIST is
    absent."""
    setting = Setting("digits", tasks=2, hidden=20, steps=30) if options.quick else Setting()
    check(setting.images, options.dataset_root)
    return setting


experiment = FisherEstimators()
