"""Two samples of one number by seed: their difference, its test, and the correction for many such tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan, sqrt

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
    if shared and a.keys() == b.keys() and all(_equal(a[seed], b[seed]) for seed in shared):
        return Comparison(summarise(a.values()), summarise(b.values()), 0.0, IDENTICAL, None, None)
    return _paired({s: a[s] for s in shared}, {s: b[s] for s in shared}) if len(shared) >= 2 else _welch(a, b)


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Student 1908, for samples of the same seeds in the same order."""
    from scipy.stats import ttest_rel

    ours, theirs = summarise(a.values()), summarise(b.values())
    gap = summarise(b[seed] - a[seed] for seed in a)
    if gap.std is None or not isfinite(gap.mean):
        return Comparison(ours, theirs, gap.mean, NONE, None, None)
    if gap.std <= ROUNDING * max(map(abs, (*a.values(), *b.values()))):
        return _without_spread(ours, theirs, gap.mean)
    p = float(ttest_rel(list(b.values()), list(a.values())).pvalue) if gap.n >= LEAST else None
    return Comparison(ours, theirs, gap.mean, "paired", p, gap.mean / gap.std)


def _welch(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Welch 1947: unequal variances."""
    from scipy.stats import ttest_ind

    ours, theirs = summarise(a.values()), summarise(b.values())
    difference = theirs.mean - ours.mean
    if ours.std is None or theirs.std is None or not isfinite(difference):
        return Comparison(ours, theirs, difference, NONE, None, None)
    spread = sqrt((ours.std**2 + theirs.std**2) / 2)
    if spread <= ROUNDING * max(map(abs, (*a.values(), *b.values()))):
        return _without_spread(ours, theirs, difference)
    tested = min(ours.n, theirs.n) >= LEAST
    p = float(ttest_ind(list(b.values()), list(a.values()), equal_var=False).pvalue) if tested else None
    return Comparison(ours, theirs, difference, "Welch", p, difference / spread)


def _without_spread(a: Summary, b: Summary, difference: float) -> Comparison:
    told = NONE if min(a.n, b.n) < LEAST else CONSTANT if difference else IDENTICAL
    return Comparison(a, b, difference, told, None, None)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): p₍ᵢ₎ becomes max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎), so that the chance of any false
    alarm among the m tests stays below the level. NaN stays NaN, and is none of the m.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, highest = [nan] * len(values), 0.0
    tests = sorted((i for i in range(len(values)) if not isnan(values[i])), key=lambda i: values[i])
    for place, index in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - place) * values[index]))
        corrected[index] = highest
    return corrected


def _equal(a: float, b: float) -> bool:
    return a == b or (isnan(a) and isnan(b))
