"""What a refresh estimates anew, of which of the stored examples: against sums over experiences written out."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    GGN,
    AbsoluteError,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Everything,
    KeepTerms,
    Kronecker,
    LowRank,
    NonFiniteCurvatureError,
    Past,
    RandomPart,
    Rank,
    SlopeAlone,
    Tikhonov,
    estimate,
)
from avalanche_curv.core.per_example.layers import Layers
from avalanche_curv.core.quadratic import kept as keeping
from avalanche_curv.core.quadratic.adaptive import predicted_loss

COUNTS = (12, 12, 5)
STEP = 0.3


def absorbed(policy, model, structure=Dense(), counts=COUNTS):  # noqa: B008
    generator, past, data = torch.Generator().manual_seed(0), Past(), []
    for count in counts:
        x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        data.append((x, torch.randint(3, (count,), generator=generator)))
        risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [data[-1]])
        past = policy.absorb(past, risk, GGN(), structure)
    return past, data


def moved(model, step=STEP):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += step
    return model


def adaptive(renew, **options):
    options = {"every": 1, "fraction": 1.0, "damping": Tikhonov(0.25)} | options
    return AdaptiveRefresh(AbsoluteError(1e-300), renew=renew, **options)


def slope(model, data):
    """Σ_t ∇ (1/n) Σ_i ℓ_i, and the losses themselves."""
    total = torch.stack([cross_entropy(model(x), y) for x, y in data]).sum()
    parts = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([part.reshape(-1) for part in parts]), float(total.detach())


@pytest.mark.parametrize("renew", [SlopeAlone(9), Everything(9), SlopeAlone(None), Everything()])
def test_a_refresh_is_that_of_what_is_drawn(net, renew):
    policy = adaptive(renew)
    past, data = absorbed(policy, net)
    before = past.model.curvature.dense()
    refreshed = policy.revise(past, moved(net), 1, GGN(), Dense())
    assert [len(places) for places in refreshed.drawn] == ([3, 3, 3] if renew.examples else [*COUNTS])
    drawn = [(x[at], y[at]) for (x, y), at in zip(data, refreshed.drawn)]
    gradient, loss = slope(net, drawn)
    torch.testing.assert_close(refreshed.model.gradient, gradient)
    assert refreshed.loss == pytest.approx(loss)
    expected = before
    if isinstance(renew, Everything):
        risks = [EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [part]) for part in drawn]
        expected = sum(estimate(GGN(), Dense(), risk).curvature.dense() for risk in risks)
        expected = expected + 0.25 * torch.eye(len(expected))
    torch.testing.assert_close(refreshed.model.curvature.dense(), expected)
    moved(net, 1e-3)
    actual = slope(net, drawn)[1]
    assert predicted_loss(refreshed, net) == pytest.approx(actual, abs=1e-4)
    check, _, _ = policy._looked(refreshed, net, 5, ())  # of the same examples
    assert check.actual == pytest.approx(actual)


def test_every_refresh_draws_anew_and_all_are_drawn_in_the_end(net):
    policy = adaptive(SlopeAlone(9))
    past, seen = absorbed(policy, net)[0], [set() for _ in COUNTS]
    for iteration in range(1, 41):
        past = policy.revise(past, moved(net, 0.01), iteration, GGN(), Dense())
        assert all(torch.equal(places, places.unique()) for places in past.drawn)
        for known, places in zip(seen, past.drawn):
            known.update(places.tolist())
    assert len(past.refreshes) == 40
    assert [len(known) for known in seen] == [*COUNTS]


@pytest.mark.parametrize(
    "structure", [Dense(), Diagonal(), BlockDiagonal(), Kronecker(KeepTerms()), LowRank(Rank(3), max_rank=9)]
)
def test_experiences_of_one_size_together_are_the_sum_of_each(net, structure):
    """As products with two vectors: what a structure keeps of a sum depends on its terms."""
    policy = adaptive(Everything())
    past, data = absorbed(policy, net, structure, counts=(8, 8, 8))
    risks = [EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [part]) for part in data]
    models = [estimate(GGN(), structure, risk, gradient=True) for risk in risks]
    for vector in torch.randn(2, past.model.space.size, generator=torch.Generator().manual_seed(1)).double():
        expected = sum(model.curvature.product(vector) for model in models) + 0.25 * vector
        torch.testing.assert_close(past.model.curvature.product(vector), expected)
    torch.testing.assert_close(past.model.gradient, sum(model.gradient for model in models))
    assert [len(own) for own in past.losses] == [8, 8, 8]
    torch.testing.assert_close(torch.cat(past.losses), torch.cat([risk.losses() for risk in risks]))


def test_a_model_that_has_grown_gets_its_curvature_anew(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 3)))
    policy = adaptive(SlopeAlone(9))
    past, _ = absorbed(policy, model)
    old, model[0] = model[0], make_model(lambda: nn.Linear(4, 5))
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3] = old.weight, old.bias
    grown = policy.revise(past, model, 0, GGN(), Dense())
    assert grown.model.space.size == grown.kept.size == 25
    with torch.no_grad():
        model[0].weight *= 1.5
    again = policy.revise(grown, model, 1, GGN(), Dense())
    assert again.kept is grown.kept
    assert not torch.equal(again.model.anchor, grown.model.anchor)


def test_before_its_first_step_a_model_as_it_was_left_is_not_looked_at(net, monkeypatch):
    policy = AdaptiveRefresh(AbsoluteError(1e-300), fraction=1.0)
    past, _ = absorbed(policy, net)
    monkeypatch.setattr(AdaptiveRefresh, "_looked", lambda *args: pytest.fail("was looked at"))
    assert policy.revise(past, net, 0, GGN(), Dense()) is past
    monkeypatch.undo()
    assert len(policy.revise(past, moved(net), 0, GGN(), Dense()).refreshes) == 1


@pytest.mark.parametrize(
    ("policy", "due"),
    [(AdaptiveRefresh(every=3), [0, 3, 6]), (AdaptiveRefresh(max_refreshes=0), []), (Accumulate(), []),
     (Accumulate(outputs=("2.weight", "2.bias")), [0])],
    ids=["every third", "never", "nothing grows", "a head that grows"],
)  # fmt: skip
def test_random_states_are_kept_only_where_a_policy_revises(policy, due, net, monkeypatch):
    past, _ = absorbed(AdaptiveRefresh(fraction=1.0), net)
    kept, regularizer = [], CurvatureRegularizer(1.0, policy=policy, structure=Dense(), past=past)

    @contextmanager
    def noted():
        kept.append(regularizer._updates)
        yield

    monkeypatch.setattr(keeping, "untouched_randomness", noted)
    regularizer.begin(net)
    for _ in range(7):
        regularizer.revise(net)
    assert kept == due


def test_a_slope_that_is_not_finite_is_named(net):
    policy = adaptive(SlopeAlone(9), look=RandomPart(2))
    past, _ = absorbed(policy, net)
    with pytest.raises(NonFiniteCurvatureError, match="The slope of 9 examples holds NaN or infinity"):
        policy.revise(past, moved(net, math.nan), 1, GGN(), Dense())


def test_one_pass_gives_losses_and_gradient(net):
    past, _ = absorbed(adaptive(Everything()), net)
    risk = past.stored[0].rebatched(5)
    losses, gradient = risk.losses_and_gradient()
    torch.testing.assert_close(losses, risk.losses())
    torch.testing.assert_close(gradient, risk.gradient())


class Own(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize("wrap", [nn.Sequential, Own])
def test_layers_of_known_modules_are_tried_once(net, wrap):
    """Those of other modules in each frozen copy: what these do may depend on their state."""
    past, _ = absorbed(adaptive(Everything()), wrap(net), Diagonal())
    known = past.stored[0]
    copied = known.frozen_at(moved(wrap(net)))
    assert ("layers" in copied.verdicts) == (wrap is nn.Sequential)
    anew = EmpiricalRisk.with_base(copied, copied.base)
    assert Layers.of(anew) == Layers.of(copied)
    assert {*Layers.of(copied).names} <= {*copied.base.modules()}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SlopeAlone(0), r"SlopeAlone\(examples=...\) must be .* None takes all that are stored"),
    (lambda: AdaptiveRefresh(renew="slope"), r"renew=...\) must be a Renewal; got 'slope'"),
])  # fmt: skip
def test_bad_options_are_named_with_their_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_refreshes_and_looks_draw_by_any_seed(make_model):
    policy, model = adaptive(SlopeAlone(6), seed=2**31 - 1), make_model(lambda: nn.Linear(4, 3))
    past, _ = absorbed(policy, model)
    with torch.no_grad():
        model.weight[0] += STEP
    assert len(policy.revise(past, model, 1, GGN(), Dense()).refreshes) == 1
