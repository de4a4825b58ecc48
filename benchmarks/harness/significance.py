"""Two samples of one number by seed: their difference, its test, and the correction for many such tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean
from typing import TypeVar

import numpy as np

from benchmarks.harness.results import Summary, summarise
from benchmarks.pairs import LEVEL

Key = TypeVar("Key")
LEAST = 3  # seeds for a test: two leave a single degree of freedom
ROUNDING = 1e-12  # of the values: a smaller spread of their differences is none


@dataclass(frozen=True)
class Comparison:
    """`b` less `a`, the name of the test or why there is none, p (None without a test) and the effect size."""

    a: Summary
    b: Summary
    difference: float
    name: str
    p: float | None = None
    effect: float | None = None
    """The difference in standard deviations: of the differences where seeds are paired (d_z), of the root mean of both
    variances elsewhere (Cohen's d)."""

    def verdict(self, corrected: float | None) -> str:
        """In words, from p after the correction for the number of tests."""
        if not isfinite(self.difference):
            return "undefined"
        if corrected is None:
            return self.name
        return "**beyond noise**" if corrected < LEVEL else "within noise"


def compared(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Student's paired t-test (1908) over the seeds that both have, where they share at least two; elsewhere Welch's
    (1947), for unequal variances.

    No test is made of fewer than three seeds, nor of differences that are the same in every seed.

    >>> test = compared({0: 1.0, 1: 2.0, 2: 3.0}, {5: 3.0, 6: 5.0, 7: 7.0})    # t = 3 / √(1/3 + 4/3), 2.94 degrees
    >>> test.name, round(test.p, 4), round(test.effect, 3)
    ('Welch', 0.1045, 1.897)
    >>> compared({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).verdict(None)
    'identical'
    """
    from scipy.stats import ttest_ind, ttest_rel

    shared = sorted(a.keys() & b.keys())
    same = a.keys() == b.keys()
    paired = len(shared) >= 2 or same
    x, y = (np.array([some[seed] for seed in (shared if paired else some)]) for some in (a, b))
    ours, theirs = summarise(x), summarise(y)
    if same and np.array_equal(x, y, equal_nan=True):
        return Comparison(ours, theirs, 0.0, "identical")
    gap = summarise(y - x) if paired else None
    difference = gap.mean if gap else theirs.mean - ours.mean
    spreads = [some.std for some in ([gap] if gap else [ours, theirs]) if some.std is not None]
    spread = sqrt(fmean(std**2 for std in spreads)) if len(spreads) == (1 if gap else 2) else 0.0
    effect = difference / spread if spread > ROUNDING * max(np.abs(x).max(), np.abs(y).max()) else None
    if min(ours.n, theirs.n) < LEAST:
        return Comparison(ours, theirs, difference, "too few seeds", None, effect)
    if effect is None:
        return Comparison(ours, theirs, difference, "constant difference" if difference else "identical")
    p = float((ttest_rel(y, x) if paired else ttest_ind(y, x, equal_var=False)).pvalue)
    return Comparison(ours, theirs, difference, "paired" if paired else "Welch", p, effect)


def corrected(tests: Mapping[Key, Comparison]) -> dict[Key, float | None]:
    """By the keys of the tests: p after Holm's correction for the number of those that have one; None for others."""
    known = iter(holm([test.p for test in tests.values() if test.p is not None]))
    return {key: None if test.p is None else next(known) for key, test in tests.items()}


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
