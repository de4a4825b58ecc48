"""A comparison seed by seed: what two methods share in a seed (weights, batches, permutations) drops out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np

from benchmarks.harness.results import Summary, summarise

LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """The differences over the seeds that both have, and p of the two-sided paired t-test (Student 1908): None where
    there is no spread to judge by."""

    difference: Summary
    p: float | None

    @property
    def verdict(self) -> str:
        """In words, at a level of 5 % that is not corrected for the number of comparisons."""
        if self.difference.n < 2:
            return "one seed"
        if not isfinite(self.difference.mean):
            return "undefined"
        if self.p is None:
            return "identical" if self.difference.mean == 0 else "constant difference"
        return "beyond noise" if self.p < LEVEL else "within noise"


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Pair | None:
    """`values` less `reference`, by seed; None where they share none.

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
