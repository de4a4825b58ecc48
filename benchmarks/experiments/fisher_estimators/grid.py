"""The estimators, and for each the strengths around those at which it works."""

from __future__ import annotations

from avalanche_curv import BatchedEmpiricalFisher, EmpiricalFisher, Fisher
from benchmarks.experiments.fisher_estimators import EXACT, NAIVE, Config, Estimator, Setting

ESTIMATORS = {
    EXACT: Estimator(Fisher()),
    "exact, 500 examples": Estimator(Fisher(), examples=500),
    "one sampled label": Estimator(Fisher(samples=1, seed=0)),
    "empirical": Estimator(EmpiricalFisher()),
    "batches of 128": Estimator(BatchedEmpiricalFisher(batch_size=128)),
}
EXPONENTS = {  # of ten: where accuracy rises, decade by decade, its plateau, and `COMMON`
    EXACT: (2, 3, 4, 5, 6),
    "exact, 500 examples": (2, 3, 4, 5),
    "one sampled label": (4, 5, 6, 7, 9),
    "empirical": (4, 5, 6, 7, 9),
    "batches of 128": (4, 6, 7, 8, 10),
}


def rows(setting: Setting, quick: bool) -> list[Config]:
    """Naive, and each estimator at every strength of its range, at two of them with `quick`."""
    found = [Config(NAIVE, NAIVE, setting)]
    for name, estimator in ESTIMATORS.items():
        for exponent in EXPONENTS[name][-2:] if quick else EXPONENTS[name]:
            found.append(Config(f"{name}, 1e{exponent}", name, setting, estimator, 10.0**exponent))
    return found
