"""The estimators, and for each the strengths around those at which it works."""

from __future__ import annotations

from avalanche_curv import BatchedEmpiricalFisher, EmpiricalFisher, Fisher
from benchmarks.fisher_estimators import EXACT, FIRST_TUNING_SEED, TUNE, Config, Estimator, Setting

NAIVE = "Naive"
ESTIMATORS = {
    EXACT: Estimator(Fisher()),
    "exact, 500 examples": Estimator(Fisher(), examples=500),
    "one sampled label": Estimator(Fisher(samples=1, seed=0)),
    "empirical": Estimator(EmpiricalFisher()),
    "batches of 128": Estimator(BatchedEmpiricalFisher(batch_size=128)),
}
EXPONENTS = {  # of ten: where accuracy rises to its plateau; of the exact one on to where it falls
    EXACT: (3, 4, 5, 6, 8, 12),
    "exact, 500 examples": (4, 5, 6),
    "one sampled label": (8, 9, 10),
    "empirical": (8, 9, 10),
    "batches of 128": (10, 11, 12),
}
STRENGTHS = {  # of shorter runs on seed 1000: three tasks, 700 steps from the second on; a few strengths of each
    EXACT: 1e6,
    "exact, 500 examples": 1e6,
    "one sampled label": 1e10,
    "empirical": 1e10,
    "batches of 128": 1e12,
}


def rows(setting: Setting, part: str, quick: bool) -> list[Config]:
    """Naive, and each estimator at every strength of its range, at three of them with `quick`."""
    first = FIRST_TUNING_SEED if part == TUNE else 0
    found = [Config(NAIVE, NAIVE, setting, first_seed=first)]
    for name, estimator in ESTIMATORS.items():
        for exponent in EXPONENTS[name][:: 3 if quick else 1]:
            label = f"{name}, 1e{exponent}"
            found.append(Config(label, name, setting, estimator, 10.0**exponent, STRENGTHS[name], first))
    return found
