"""λ by evidence: against exact marginal likelihoods of linear-Gaussian models, and what it refuses."""

import logging
import math
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from avalanche_curv import (
    EKFAC,
    GGN,
    Accumulate,
    AdaptiveRefresh,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Evidence,
    Fisher,
    Hessian,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    Past,
    Rank,
    TaskEvidence,
    estimate,
    task_evidence,
)

exactly = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
PAST, NEW, FEATURES = 30, 12, 3
GRID = np.logspace(-2, 2, 401)


def regression(examples, seed, shift=0.0):
    """(x, y) of a linear model with noise of variance ½, of which a squared error is the negative log-likelihood."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, FEATURES, generator=generator).double() * torch.tensor([1.0, 0.5, 2.0]).double()
    weight = torch.tensor([1.0, -1.0, 0.5]).double() + shift
    return x, (x @ weight + 0.5**0.5 * torch.randn(examples, generator=generator).double())[:, None]


def linear(weight):
    model = nn.Linear(FEATURES, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight.reshape(1, -1))
    return model


def risk_at(weight, data):
    return EmpiricalRisk.snapshot(linear(weight), nn.MSELoss(), [data])


def least_squares(x, y):
    return torch.linalg.solve(x.T @ x, x.T @ y)[:, 0]


class Pair:
    """A past with its minimum m and curvature C, and a new task with its own, all in closed form."""

    def __init__(self, shift=0.5):
        (px, py), (self.x, self.y) = regression(PAST, 0), regression(NEW, 1, shift)
        self.m = least_squares(px, py)
        self.c, self.h = 2 * px.T @ px / PAST, 2 * self.x.T @ self.x / NEW
        self.past = estimate(GGN(), Dense(), risk_at(self.m, (px, py)))

    def trained(self, strength):
        """The minimum of the mean squared error + λ q."""
        slope = 2 * self.x.T @ self.y[:, 0] / NEW
        return torch.linalg.solve(self.h + strength * self.c, slope + strength * self.c @ self.m)

    def exact(self, strength):
        """log p(y | x, λ): the marginal of y under the prior N(m, (NλC)⁻¹) and noise of variance ½."""
        prior = torch.linalg.inv(NEW * strength * self.c)
        return float(
            MultivariateNormal(self.x @ self.m, 0.5 * torch.eye(NEW).double() + self.x @ prior @ self.x.T).log_prob(
                self.y[:, 0]
            )
        )

    def settled(self):
        """Where training and choosing in turn end."""
        strength = 1.0
        for _ in range(20):
            strength = self.found(strength).best()
        return strength

    def found(self, strength):
        return task_evidence(self.past, risk_at(self.trained(strength), (self.x, self.y)), GGN(), Dense())


def test_evidence_is_the_exact_marginal_likelihood_of_a_linear_gaussian_model():
    pair = Pair()
    for strength in (0.03, 1.0, 40.0):
        normalised = pair.found(strength).log(strength) - 0.5 * NEW * math.log(math.pi)
        assert normalised == pytest.approx(pair.exact(strength), rel=1e-10)


def test_repeated_it_ends_at_the_maximum_of_the_exact_marginal_likelihood():
    pair = Pair()
    strength = pair.settled()
    best = GRID[np.argmax([pair.exact(one) for one in GRID])]
    assert strength == pytest.approx(best, rel=0.025)  # a step of the grid
    slope = (pair.exact(strength * 1.0001) - pair.exact(strength / 1.0001)) / 2e-4
    assert abs(slope) < 1e-4


def test_a_past_like_the_task_is_trusted_more_than_one_that_is_not():
    strengths = [Pair(shift).settled() for shift in (0.1, 0.5, 3.0)]
    assert all(a > 2 * b for a, b in pairwise(strengths))


def test_the_best_strength_is_the_largest_log_evidence_of_these_parameters():
    found = TaskEvidence(50, 0.3, 0.02, torch.tensor([5.0, 0.7, 0.01]).double())
    assert found.best() == pytest.approx(GRID[np.argmax([found.log(one) for one in GRID])], rel=0.025)
    assert TaskEvidence(50, 0.3, 0.0, torch.ones(2)).best() == math.inf
    assert TaskEvidence(50, 0.3, 0.1, torch.zeros(2)).best() == 0


def test_where_the_past_is_flat_the_task_is_integrated_out():
    """Differences of log Z with an improper prior, against whole determinants."""
    generator = torch.Generator().manual_seed(3)
    px = torch.randn(2, FEATURES, generator=generator).double()  # two examples of three parameters
    pair = Pair()
    pair.c = px.T @ px
    pair.past = estimate(GGN(), Dense(), risk_at(pair.m, (px, px @ pair.m[:, None])))

    def log_integral(strength):
        theta = pair.trained(strength)
        away, left = theta - pair.m, pair.x @ theta - pair.y[:, 0]
        exponent = left @ left + 0.5 * NEW * strength * away @ pair.c @ away
        return -exponent + math.log(strength) - 0.5 * torch.linalg.slogdet(pair.h + strength * pair.c)[1]

    ours = [pair.found(one).log(one) for one in (0.1, 1.0, 10.0)]
    theirs = [float(log_integral(one)) for one in (0.1, 1.0, 10.0)]
    assert ours[0] - ours[1] == pytest.approx(theirs[0] - theirs[1], rel=1e-8)
    assert ours[1] - ours[2] == pytest.approx(theirs[1] - theirs[2], rel=1e-8)
    assert len(pair.found(1.0).relative) == 2


def test_distances_are_from_the_minimum_and_not_from_the_anchor():
    pair = Pair()
    moved = pair.past.reanchored(pair.m + 0.7)
    found = task_evidence(moved, risk_at(pair.trained(1.0), (pair.x, pair.y)), GGN(), Dense())
    away = pair.trained(1.0) - pair.m
    assert found.distance == pytest.approx(float(away @ pair.c @ away), rel=1e-8)


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def risk_of(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 4, generator=generator).double(), torch.randint(3, (40,), generator=generator)
    return EmpiricalRisk.snapshot(network(seed), nn.CrossEntropyLoss(), [(x, y)])


@pytest.mark.parametrize("structure", [Diagonal(), Dense(), Kronecker()])
def test_relative_eigenvalues_are_those_of_the_matrices(structure):
    """H v = μ C v; a full rank of C by damping its factors, entries, or all of it."""
    old, new = (estimate(Fisher(), structure, risk_of(seed)).curvature for seed in (0, 1))
    if isinstance(structure, Kronecker):
        for layer in old.layers:
            for factor in layer.terms[0].tensors():
                factor.diagonal().add_(0.1)
    else:
        old = old.damped(0.1)
    theirs = scipy.linalg.eigh(new.dense().numpy(), old.dense().numpy(), eigvals_only=True)
    exactly(new.relative_to(old, 1e-12).sort().values, torch.from_numpy(theirs))


@pytest.mark.parametrize(
    ("structure", "policy", "said"),
    [
        (MatrixFree(), Accumulate(), "does not have at hand"),
        (LowRank(Rank(2)), Accumulate(), "does not have at hand"),
        (Kronecker(KeepTerms()), Accumulate(), r"Dense\(\) or Kronecker\(\)"),
        (Diagonal(), AdaptiveRefresh(), "moves meanwhile"),
    ],
)
def test_what_it_cannot_choose_for_is_refused_before_training(structure, policy, said):
    regularizer = CurvatureRegularizer(Evidence(), structure=structure, policy=policy)
    with pytest.raises(TypeError, match=said):
        regularizer.check_risk(risk_of(0).trial())


def test_a_given_past_that_it_cannot_choose_for_is_refused_before_training():
    """Of corrected eigenvalues relative to those of factors nothing is known; with factors there is."""
    for made, refused in ((EKFAC(), True), (Kronecker(), False)):
        past = Accumulate().absorb(Past(), risk_of(0), Fisher(), made)
        regularizer = CurvatureRegularizer(Evidence(), structure=Kronecker(), past=past)
        with pytest.raises(TypeError, match="at hand") if refused else nullcontext():
            regularizer.check_risk(risk_of(1).trial())


def test_a_curvature_that_is_no_precision_is_refused_before_training():
    with pytest.warns(UserWarning, match="Hessian"):
        regularizer = CurvatureRegularizer(Evidence(), curvature=Hessian(), structure=Dense())
    with pytest.raises(TypeError, match=r"precision of a prior, which Hessian.*psd=Clip"):
        regularizer.check_risk(risk_of(0).trial())


def test_parts_of_a_stream_that_hides_its_tasks_are_refused():
    regularizer, risk = CurvatureRegularizer(Evidence()), risk_of(0)
    with pytest.raises(TypeError, match="access_task_boundaries"):
        regularizer.absorb_part(risk.model, nn.CrossEntropyLoss(), risk.batches, share=0.1)


def test_a_strength_that_is_no_number_and_no_rule_is_refused():
    with pytest.raises(ValueError, match="Evidence"):
        CurvatureRegularizer(Evidence)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()])
@pytest.mark.parametrize("policy", [Accumulate(), Merge()])
def test_each_task_with_a_past_sets_the_strength_of_the_next(structure, policy, caplog):
    regularizer, past = CurvatureRegularizer(Evidence(first=2.0), structure=structure, policy=policy), Past()
    strengths = [regularizer.strength]
    with caplog.at_level(logging.INFO, logger="avalanche_curv"):
        for seed in range(3):
            risk = risk_of(seed)
            regularizer.check_risk(risk.trial())
            regularizer.absorb_risk(risk, examples=100)
            strengths.append(regularizer.strength)
            if past.model is not None:
                found = task_evidence(past.model, risk, Fisher(), structure, 100)
                assert found.best() == pytest.approx(strengths[-1], rel=1e-6)
                assert strengths[-1] * 100 * found.distance == pytest.approx(found.determined(strengths[-1]), rel=1e-6)
            past = regularizer.past
    assert strengths[:2] == [2.0, 2.0]
    assert len(set(strengths[1:])) == 3
    assert [record.message.split()[1] for record in caplog.records] == [f"{one:.4g}" for one in strengths[2:]]


def test_the_strength_that_was_chosen_is_saved():
    first, second = (CurvatureRegularizer(Evidence()) for _ in range(2))
    for seed in range(2):
        first.absorb_risk(risk_of(seed))
    second.load_state_dict(first.state_dict())
    assert second.strength == first.strength != 1.0
    fixed = CurvatureRegularizer(3.0).state_dict()
    with pytest.raises(ValueError, match="got that of CurvatureRegularizer without strength, of other options"):
        second.load_state_dict(fixed)
    number = CurvatureRegularizer(3.0)
    number.load_state_dict(first.state_dict())  # which is an option there
    assert number.strength == 3.0


@pytest.mark.parametrize(
    ("weight", "first", "then"),
    [(1e4, 3.0, 3.0), (1.0 + 1e-9, 1.0, 1e6)],
    ids=["diverged", "hardly moved"],
)
def test_a_task_that_says_nothing_of_strengths_does_not_decide_them(weight, first, then, recwarn):
    """Kept where training has left the minimum, and bounded where the parameters are the past's but for rounding."""
    pair, rule = Pair(), Evidence(first)
    data = pair.x, pair.y
    at = pair.m * weight
    found = rule.next(first, pair.past, risk_at(at, data), GGN(), Dense(), NEW)
    assert found == then
    assert len([one for one in recwarn if "keeps strength" in str(one.message)]) == (weight > 2)


def test_a_rule_that_chooses_no_number_loses_nothing():
    class Broken(Evidence):
        def next(self, *arguments):
            return math.nan

    regularizer = CurvatureRegularizer(Broken())
    regularizer.absorb_risk(risk_of(0))
    with pytest.raises(ValueError, match=r"Broken.* chose must be a finite number"):
        regularizer.absorb_risk(risk_of(1))
    assert (regularizer.past.experiences, regularizer.strength) == (1, 1.0)
