import math
from collections import Counter
from functools import partial

import pytest
import torch

from avalanche_curv import AbsoluteError, AllStored, RandomPart

GENERATOR = torch.Generator().manual_seed(0)
BEFORE = [torch.rand(count, generator=GENERATOR, dtype=torch.float64) for count in (300, 50, 7)]
CHANGES = [0.5 + 0.2 * torch.randn(len(old), generator=GENERATOR, dtype=torch.float64) for old in BEFORE]
START = sum(float(old.mean()) for old in BEFORE)
ACTUAL = START + sum(float(change.mean()) for change in CHANGES)


def losses_of(changes, indices):
    return [(old + change)[own] for old, change, own in zip(BEFORE, changes, indices)]


def looked(look, trust, predicted=START, seed=0, seen=None):
    def losses(indices):
        assert all(torch.equal(own, own.sort().values) for own in indices)
        if seen is not None:
            seen.update((t, int(i)) for t, own in enumerate(indices) for i in own)
        return losses_of(CHANGES, indices)

    return look.check(START, predicted, BEFORE, losses, trust, seed)


@pytest.mark.parametrize("look", [AllStored(), RandomPart(357), RandomPart(10_000), RandomPart(30, sigmas=1e6)])
def test_all_examples_give_the_loss_itself_each_looked_at_once(look):
    seen = Counter()
    assert looked(look, AbsoluteError(ACTUAL - START), seen=seen).actual == pytest.approx(ACTUAL, abs=1e-13)
    assert len(seen) == 357
    assert {*seen.values()} == {1}


@pytest.mark.parametrize("predicted", [START, ACTUAL])
def test_a_clear_verdict_takes_the_first_part_alone_in_equal_shares(predicted):
    seen = Counter()
    found = looked(RandomPart(12), AbsoluteError(0.9), predicted=predicted, seen=seen)
    assert (AbsoluteError(0.9).broken(found) is None) == (predicted == ACTUAL)
    assert Counter(t for t, _ in seen) == {0: 4, 1: 4, 2: 7}  # twice four would be all of the last


def test_estimates_are_unbiased_with_the_error_that_is_said():
    look, means, spreads = RandomPart(60), [], []
    for seed in range(4000):
        actual, error = next(look._estimates(START, BEFORE, partial(losses_of, CHANGES), seed))
        means.append(actual)
        spreads.append(error**2)
    paper = sum(float(c.var()) / m * (1 - m / len(c)) for c, m in zip(CHANGES, (20, 20, 7)))
    found = torch.tensor(means, dtype=torch.float64)
    assert float(found.mean()) == pytest.approx(ACTUAL, abs=4 * math.sqrt(paper / 4000))
    assert float(found.var()) == pytest.approx(paper, rel=0.1)
    assert sum(spreads) / 4000 == pytest.approx(paper, rel=0.05)


def test_near_the_edge_of_the_region_few_verdicts_err_and_most_take_a_part():
    """Where the estimate is two standard errors of its first part from the edge."""
    error = math.sqrt(sum(float(c.var()) / m * (1 - m / len(c)) for c, m in zip(CHANGES, (20, 20, 7))))
    for side in (-1, 1):
        trust, wrong, taken = AbsoluteError(ACTUAL - START + side * 2 * error), 0, 0
        for seed in range(300):
            seen = Counter()
            verdict = trust.broken(looked(RandomPart(60), trust, seed=seed, seen=seen)) is None
            wrong += verdict != (side > 0)
            taken += len(seen)
        assert wrong <= 9
        assert taken / 300 < 250


def test_a_loss_that_is_no_number_is_not_trusted():
    changed = [c.clone().fill_(math.nan) for c in CHANGES]
    found = RandomPart(12).check(START, START, BEFORE, partial(losses_of, changed), AbsoluteError(1.0), 0)
    assert AbsoluteError(1.0).broken(found)


@pytest.mark.parametrize(("options", "message"), [
    ({"examples": 0}, r"RandomPart\(examples=...\) must be"),
    ({"sigmas": 0}, r"above 0; got 0. 2 errs in one look of twenty"),
])  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RandomPart(**options)
