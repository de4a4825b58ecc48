"""Parts of a model that are frozen when the past is absorbed and train later, and the reverse."""

import warnings

import pytest
import torch
from torch import nn

from avalanche_curv import (
    AbsoluteError,
    Accumulate,
    AdaptiveRefresh,
    Dense,
    EmpiricalRisk,
    Fisher,
    Merge,
    Past,
    Refresh,
    Tikhonov,
)

CRITERION = nn.CrossEntropyLoss()
POLICIES = [
    Accumulate(), Merge(), Merge(decay=0.5), Refresh(fraction=1.0),
    AdaptiveRefresh(damping=Tikhonov(0.0), fraction=1.0),
]  # fmt: skip


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()


def task(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    return [(inputs, torch.randint(3, (6,), generator=generator))]


def moved(model, seed, names=("0.weight", "0.bias", "2.weight", "2.bias")):
    """Somewhere else, in the parameters of these names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def fisher(model, batches):
    """(1/N) Σ_i Σ_c p_c s_c s_cᵀ with s_c = ∇ log p_c, one example and class after the other."""
    total = 0
    for x in batches[0][0]:
        logs = model(x[None])[0].log_softmax(0)
        for log in logs:
            score = torch.cat([
                g.reshape(-1) for g in torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            ])
            total = total + log.exp().detach() * torch.outer(score, score)
    return total / len(batches[0][0])


def absorb(policy, past, model, batches, **selection):
    return policy.absorb(past, EmpiricalRisk.snapshot(model, CRITERION, batches, **selection), Fisher(), Dense())


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_was_in_the_space_of_the_past_stays_in_it_while_a_part_is_frozen(policy, model):
    """All of it trains on the first task, only the head on the second: the past of both is over all parameters."""
    first, second = task(1), task(2)
    a1, c1 = vector(model), fisher(model, first)
    past = absorb(policy, Past(), model, first)
    moved(model, 3, names=("2.weight", "2.bias"))
    a2, c2, c1_again = vector(model), fisher(model, second), fisher(model, first)
    model[0].requires_grad_(False)
    past = absorb(policy, past, model, second)
    assert past.model.space.size == len(a1)
    model[0].requires_grad_(True)
    theta = vector(moved(model, 4))
    d1, d2 = theta - a1, theta - a2
    expected = {
        "Accumulate": (d1 @ c1 @ d1 + d2 @ c2 @ d2) / 2,
        "Merge": d2 @ (getattr(policy, "decay", 1) * c1 + c2) @ d2 / 2,
        "Refresh": d2 @ (c1_again + c2) @ d2 / 2,
    }
    slope = 0.0
    if isinstance(policy, AdaptiveRefresh):
        slope = past.model.gradient @ d2
        expected["AdaptiveRefresh"] = expected["Refresh"] + slope
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(past.model.penalty(model), expected[type(policy).__name__])


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_frozen_part_that_is_included_is_protected_when_it_trains(policy, model):
    """A head warmed up on a frozen body, then everything."""
    batches = task(1)
    model[0].requires_grad_(False)
    past = absorb(policy, Past(), model, batches, include=["*"])
    start, c = vector(model), fisher(model.requires_grad_(True), batches)
    d = vector(moved(model, 2)) - start
    slope = 0.0 if past.model.gradient is None else past.model.gradient @ d
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(past.model.penalty(model), d @ c @ d / 2 + slope)


@pytest.mark.parametrize("policy", POLICIES[:4], ids=repr)
def test_a_part_that_trains_without_having_been_in_the_space_is_said(policy, model):
    model[0].requires_grad_(False)
    past = absorb(policy, Past(), model, task(1))
    past = absorb(policy, past, model, task(2))
    assert past.model.unprotected(model) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        past.model.penalty(model)
    model[0].requires_grad_(True)
    assert past.model.unprotected(model) == ("0.weight", "0.bias")
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias\. Absorb the past with include=") as caught:
        past.model.penalty(model)
    assert caught[0].filename == __file__
    past = absorb(policy, past, model, task(3))
    assert past.model.unprotected(model) == ()  # in the space from now on


def test_what_is_left_out_on_purpose_and_what_grows_later_is_not_said(model):
    model[0].requires_grad_(False)
    past = absorb(Accumulate(), Past(), model, task(1), exclude=["0"])
    model.add_module("more", nn.Linear(3, 3).double())
    model[0].requires_grad_(True)
    assert past.model.unprotected(model) == ()


def test_an_adaptive_refresh_takes_in_a_part_that_begins_to_train(model):
    policy = AdaptiveRefresh(damping=Tikhonov(0.0), fraction=1.0)
    batches = task(1)
    model[0].requires_grad_(False)
    past = absorb(policy, Past(), model, batches)
    assert policy.revise(past, model, 0, Fisher(), Dense()) is past
    model[0].requires_grad_(True)
    revised = policy.revise(past, model, 0, Fisher(), Dense())
    assert [event.reason for event in revised.refreshes] == ["0.weight, 0.bias train now and did not before"]
    torch.testing.assert_close(revised.model.curvature.dense(), fisher(model, batches))
    assert revised.model.unprotected(model) == ()


def test_a_refresh_during_an_experience_keeps_a_part_that_is_frozen(model):
    policy = AdaptiveRefresh(AbsoluteError(1e-6), damping=Tikhonov(0.0), fraction=1.0)
    batches = task(1)
    past = absorb(policy, Past(), model, batches)
    model[0].requires_grad_(False)
    moved(model, 2, names=("2.weight", "2.bias"))
    revised = policy.revise(past, model, 5, Fisher(), Dense())
    assert len(revised.refreshes) == 1
    torch.testing.assert_close(revised.model.curvature.dense(), fisher(model.requires_grad_(True), batches))


@pytest.mark.parametrize("policy", [Refresh(), AdaptiveRefresh()], ids=repr)
def test_a_past_without_examples_is_no_beginning_for_what_estimates_anew(policy, model):
    past = absorb(Accumulate(), Past(), model, task(1))
    with pytest.raises(ValueError, match=r"Refresh\(\) .* stores those of 0 of its 1 experiences"):
        absorb(policy, past, model, task(2))
