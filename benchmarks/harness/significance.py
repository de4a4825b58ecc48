"""Two samples of one number by seed: their difference, its test, and the correction for many such tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import numpy as np

from benchmarks.harness.results import Summary, summarise
from benchmarks.pairs import LEVEL

IDENTICAL = "identical"
NONE = "none"
CONSTANT = "constant difference"
LEAST = 3  # seeds for a test: two leave a single degree of freedom
ROUNDING = 1e-12  # of the values: a smaller spread of their differences is none


@dataclass(frozen=True)
class Comparison:
    """`b` less `a`, the name of the test or why there is none, p (None without a test) and the effect size."""

    a: Summary
    b: Summary
    difference: float
    name: str
    p: float | None
    effect: float | None
    """The difference in standard deviations: of the differences where seeds are paired (d_z), of the root mean of both
    variances elsewhere (Cohen's d)."""

    def verdict(self, corrected: float | None) -> str:
        """In words, from p after the correction."""
        if not isfinite(self.difference):
            return "undefined"
        if corrected is None:
            return self.name if self.name in (IDENTICAL, CONSTANT) else "too few seeds"
        return "**beyond noise**" if corrected < LEVEL else "within noise"


def compared(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Student's paired t-test over the seeds that both have, where they share at least two, Welch's t-test elsewhere.

    No test is made of fewer than three seeds, nor of differences that are the same in every seed.

    >>> test = compared({0: 1.0, 1: 2.0, 2: 3.0}, {5: 3.0, 6: 5.0, 7: 7.0})    # t = 3 / √(1/3 + 4/3), 2.94 degrees
    >>> test.name, round(test.p, 4), round(test.effect, 3)
    ('Welch', 0.1045, 1.897)
    >>> compared({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).verdict(None)
    'identical'
    """
    shared = sorted(a.keys() & b.keys())
    if shared and a.keys() == b.keys() and np.array_equal(*_values(a, b, shared), equal_nan=True):
        return Comparison(summarise(a.values()), summarise(b.values()), 0.0, IDENTICAL, None, None)
    paired = len(shared) >= 2  # Student 1908; else Welch 1947, for unequal variances
    x, y = _values(a, b, shared) if paired else (np.array([*a.values()]), np.array([*b.values()]))
    ours, theirs = summarise(x), summarise(y)
    gap = summarise(y - x) if paired else None
    difference = gap.mean if gap else theirs.mean - ours.mean
    if ours.std is None or theirs.std is None or not isfinite(difference):
        return Comparison(ours, theirs, difference, NONE, None, None)
    spread = gap.std or 0.0 if gap else sqrt((ours.std**2 + theirs.std**2) / 2)
    tested = min(ours.n, theirs.n) >= LEAST
    if spread <= ROUNDING * max(np.abs(x).max(), np.abs(y).max()):
        told = NONE if not tested else CONSTANT if difference else IDENTICAL
        return Comparison(ours, theirs, difference, told, None, None)
    from scipy.stats import ttest_ind, ttest_rel

    p = float((ttest_rel(y, x) if paired else ttest_ind(y, x, equal_var=False)).pvalue) if tested else None
    return Comparison(ours, theirs, difference, "paired" if paired else "Welch", p, difference / spread)


def _values(a: Mapping[int, float], b: Mapping[int, float], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([a[seed] for seed in seeds]), np.array([b[seed] for seed in seeds])


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): p₍ᵢ₎ becomes max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎), so that the chance of any false
    alarm among the m tests stays below the level. NaN stays NaN, and is none of the m.

    >>> [round(p, 9) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    from statsmodels.stats.multitest import multipletests

    corrected = np.array(values, dtype=float)
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = multipletests(corrected[known], method="holm")[1]
    return corrected.tolist()
