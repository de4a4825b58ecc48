"""Two samples of one number by seed: their difference, its test, and the correction for many such tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

from benchmarks.harness.summary import Summary, summarise
from benchmarks.pairs import LEVEL, paired

IDENTICAL = "identical"


@dataclass(frozen=True)
class Comparison:
    """`b` less `a`, the name of the test, its p (None where nothing can be tested) and the effect size."""

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
            return IDENTICAL if self.name == IDENTICAL else "too few seeds"
        return "**beyond noise**" if corrected < LEVEL else "within noise"


def compared(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Student's paired t-test over the seeds that both have, where they share at least two, Welch's t-test elsewhere.

    >>> test = compared({0: 1.0, 1: 2.0, 2: 3.0}, {5: 3.0, 6: 5.0, 7: 7.0})    # t = 3 / √(1/3 + 4/3), 2.94 degrees
    >>> test.name, round(test.p, 4), round(test.effect, 3)
    ('Welch', 0.1045, 1.897)
    >>> compared({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).verdict(None)
    'identical'
    """
    shared = sorted(a.keys() & b.keys())
    if shared and a.keys() == b.keys() and all(a[seed] == b[seed] or _both_nan(a[seed], b[seed]) for seed in shared):
        return Comparison(summarise(a.values()), summarise(b.values()), 0.0, IDENTICAL, None, None)
    return _paired({s: a[s] for s in shared}, {s: b[s] for s in shared}) if len(shared) >= 2 else _welch(a, b)


def _paired(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    pair = paired(b, a)
    if pair is None:
        raise ValueError("The samples share no seed. Use Welch's test.")
    mean, std = pair.difference.mean, pair.difference.std
    constant = isfinite(mean) and not std  # the same difference in every seed: beyond any noise
    p = 0.0 if constant else pair.p
    effect = (mean / std if std else inf if mean > 0 else -inf) if isfinite(mean) else None
    return Comparison(summarise(a.values()), summarise(b.values()), mean, "paired", p, effect)


def _welch(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison:
    """Welch 1947: unequal variances. No test with fewer than two seeds on a side."""
    from scipy.stats import ttest_ind

    ours, theirs = summarise(a.values()), summarise(b.values())
    difference = theirs.mean - ours.mean
    if ours.std is None or theirs.std is None or not isfinite(difference):
        return Comparison(ours, theirs, difference, "none", None, None)
    spread = sqrt((ours.std**2 + theirs.std**2) / 2)
    if not spread:
        return Comparison(ours, theirs, difference, "Welch", 1.0 if difference == 0 else 0.0, None)
    p = float(ttest_ind(list(b.values()), list(a.values()), equal_var=False).pvalue)
    return Comparison(ours, theirs, difference, "Welch", p, difference / spread)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): p₍ᵢ₎ becomes max_{j ≤ i} min(1, (m − j + 1) p₍ⱼ₎), so that the chance of any false
    alarm among the m tests stays below the level.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = highest
    return corrected


def _both_nan(a: float, b: float) -> bool:
    return a != a and b != b
