"""Comparisons seed by seed: what two methods share in a seed (weights, batches, permutations) drops out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import numpy as np

from benchmarks.harness.results import Summary, summarise

LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """The differences over the seeds that both have, and p of the two-sided paired t-test (Student 1908); p is None
    where all differences are equal."""

    difference: Summary
    p: float | None

    @property
    def verdict(self) -> str:
        """What the test says in words, at a level of 5 %, uncorrected for the number of comparisons."""
        if self.difference.n < 2:
            return "one seed"
        if not isfinite(self.difference.mean):
            return "undefined"
        if self.p is None:
            return "identical" if self.difference.mean == 0 else "constant difference"
        return "beyond noise" if self.p < LEVEL else "within noise"


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Pair | None:
    """The differences `values` − `reference` by seed, with their test; None where they share no seed.

    >>> pair = paired({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.0, 2: 1.0, 7: 5.0})
    >>> pair.difference, round(pair.p, 4), pair.verdict          # t = 2 / (1 / √3)
    (Summary(mean=2.0, std=1.0, n=3), 0.0742, 'within noise')
    """
    from scipy.stats import ttest_rel

    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    ours, theirs = (np.array([some[seed] for seed in seeds]) for some in (values, reference))
    difference = summarise(ours - theirs)
    return Pair(difference, float(ttest_rel(ours, theirs).pvalue) if difference.std else None)


def mean_ratio(values: Mapping[int, float], reference: Mapping[int, float]) -> float | None:
    """The mean over the seeds that both have of `values` divided by `reference`, such as of training times; None where
    they share none, seeds whose reference is 0 left out.

    >>> mean_ratio({0: 2.0, 1: 6.0}, {0: 1.0, 1: 2.0, 2: 9.0})
    2.5
    """
    ratios = [values[seed] / reference[seed] for seed in values.keys() & reference.keys() if reference[seed]]
    return fmean(ratios) if ratios else None
