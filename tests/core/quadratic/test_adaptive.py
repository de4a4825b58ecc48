import math
import re

import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    AbsoluteError,
    AdaptiveRefresh,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Hessian,
    Kronecker,
    LowRank,
    MatrixFree,
    Past,
    RandomPart,
    Rank,
    RatioBand,
    Refresh,
    RelativeError,
    StepBound,
    Tikhonov,
    estimate,
)
from avalanche_curv.core.quadratic.adaptive import AdaptivePast, TrustCheck, memory_loss, predicted_loss

ALWAYS = AbsoluteError(1e-300)


class Cubic(nn.Module):
    """f(θ) = θ √(1 + c θ), so that the squared error to the target 0 is θ² + c θ³."""

    def __init__(self, c, theta):
        super().__init__()
        self.c, self.theta = c, nn.Parameter(torch.tensor([theta], dtype=torch.float64))

    def forward(self, inputs):
        return (self.theta * (1 + self.c * self.theta).sqrt()).expand(len(inputs), 1)


def absorbed(policy, model, criterion, x, y, curvature, structure, times=1):
    past = Past()
    for _ in range(times):
        past = policy.absorb(past, EmpiricalRisk.snapshot(model, criterion, [(x, y)]), curvature, structure)
    return past


def moved(model, step):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += step
    return model


@pytest.mark.parametrize("trust", [AbsoluteError(1e-6), RelativeError(1e-6), RatioBand(0.999999, 1.000001, floor=0.0)])
@pytest.mark.parametrize(
    ("curvature", "structure"), [(Hessian(), Dense()), (GGN(), MatrixFree()), (GGN(), LowRank(Rank(8)))], ids=str
)
def test_a_quadratic_loss_is_never_refreshed_however_far_one_goes(make_model, trust, curvature, structure):
    model = make_model(lambda: nn.Linear(3, 2))
    draws = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double()
    policy = AdaptiveRefresh(trust, every=1, fraction=1.0)
    past = absorbed(policy, model, nn.MSELoss(), draws[:, :3], draws[:, 3:], curvature, structure, times=3)
    for iteration in range(50):
        assert policy.revise(past, moved(model, 0.5 * math.sin(iteration)), iteration, curvature, structure) is past
    assert past.refreshes == ()
    assert predicted_loss(past, model) == pytest.approx(memory_loss(past.stored, model), rel=1e-6)


@pytest.mark.parametrize(("c", "tolerance", "step"), [(0.2, 0.05, 0.07), (0.3, 1e-3, 0.011), (0.05, 0.4, 0.3)])
def test_a_cubic_loss_is_refreshed_where_its_remainder_crosses_the_tolerance(c, tolerance, step):
    model, policy = Cubic(c, 0.5), AdaptiveRefresh(AbsoluteError(tolerance), every=1, max_refreshes=None, fraction=1.0)
    past = absorbed(policy, model, nn.MSELoss(), torch.zeros(4, 1), torch.zeros(4, 1), Hessian(), Dense())
    for iteration in range(1, 41):
        past = policy.revise(past, moved(model, step), iteration, Hessian(), Dense())
    reach = (tolerance / c) ** (1 / 3)  # L − q = c δ³ about every anchor
    every = math.floor(reach / step) + 1
    assert [event.iteration for event in past.refreshes] == list(range(every, 41, every))
    assert all(event.error == pytest.approx(c * (every * step) ** 3) for event in past.refreshes)


def test_value_slope_and_curvature_are_those_of_the_loss():
    model = Cubic(0.0, 1.0)  # θ²
    policy = AdaptiveRefresh(AbsoluteError(0.01), fraction=1.0, every=1, damping=Tikhonov(0.0))
    past = absorbed(policy, model, nn.MSELoss(), torch.zeros(1, 1), torch.zeros(1, 1), Hessian(), Dense())
    assert past.loss == 1
    assert past.model.gradient.item() == 2
    assert past.model.curvature.dense().item() == 2
    moved(model, -0.5)
    assert predicted_loss(past, model) == pytest.approx(0.25)
    assert past.model(model).item() == pytest.approx(0.25 - 1)  # the penalty is the increase


def test_the_picture_is_the_sum_over_experiences_of_their_mean_losses(net):
    generator = torch.Generator().manual_seed(0)
    policy, past, parts = AdaptiveRefresh(fraction=1.0), Past(), []
    for count in (6, 3):
        x, y = torch.randn(count, 4, generator=generator).double(), torch.randint(3, (count,), generator=generator)
        parts.append((x, y))
        past = policy.absorb(past, EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [(x, y)]), GGN(), Dense())
        moved(net, 0.1)
    moved(net, -0.1)
    risks = [EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [part]) for part in parts]
    models = [estimate(GGN(), Dense(), risk, gradient=True) for risk in risks]
    slope = sum(model.gradient for model in models)
    tau = float(slope.norm() / (10 * past.model.anchor.norm()))
    expected = sum(model.curvature.dense() for model in models) + tau * torch.eye(len(slope))
    torch.testing.assert_close(past.model.curvature.dense(), expected)
    torch.testing.assert_close(past.model.gradient, slope)
    assert past.loss == pytest.approx(sum(risk.value() for risk in risks))
    assert past.damping == pytest.approx(tau)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), LowRank(Rank(2), max_rank=2), MatrixFree()])
def test_the_step_bound_holds_the_minimum_within_its_radius(net, structure):
    x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 0, 1])
    policy = AdaptiveRefresh(damping=StepBound(0.5), fraction=1.0)
    past = absorbed(policy, net, nn.CrossEntropyLoss(), x, y, GGN(), structure, times=2)
    model = past.model
    whole = torch.stack([model.curvature.product(row) for row in torch.eye(model.space.size).double()])
    minimum = torch.linalg.solve(whole, -model.gradient)
    assert 0 < minimum.norm() <= 0.5 * model.anchor.norm()
    torch.testing.assert_close(model.gradient, 2 * past.stored[0].gradient())  # also where the sum is cut to a rank


def test_without_damping_the_slope_may_leave_the_range_and_q_has_no_bound(net):
    x, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1])
    free, bound = (
        absorbed(AdaptiveRefresh(damping=d, fraction=1.0), net, nn.CrossEntropyLoss(), x, y, GGN(), LowRank(Rank(1)))
        for d in (Tikhonov(0.0), Tikhonov(0.1))
    )
    vector = free.model.curvature.vectors[0]
    downhill = -(free.model.gradient - vector * (vector @ free.model.gradient))
    assert downhill.norm() > 1e-3
    assert free.model.increase(1e6 * downhill) < -1
    assert bound.model.increase(1e6 * downhill) > 0


def test_a_past_of_another_policy_is_taken_over_and_its_own_kept(net):
    x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 0, 1])
    past = absorbed(Refresh(1.0), net, nn.CrossEntropyLoss(), x, y, GGN(), Diagonal(), times=2)
    taken = AdaptivePast.of(past)
    assert (taken.model, taken.stored, taken.experiences) == (past.model, past.stored, 2)
    assert (taken.loss, taken.damping, taken.refreshes) == (0.0, 0.0, ())
    assert AdaptivePast.of(taken) is taken
    risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [(x, y)])
    on = AdaptiveRefresh(fraction=1.0).absorb(past, risk, GGN(), Diagonal())
    assert on.experiences == len(on.stored) == 3
    assert on.loss == pytest.approx(3 * risk.value())


def test_the_cap_counts_for_each_experience_and_the_end_of_one_always_refreshes():
    policy = AdaptiveRefresh(ALWAYS, every=1, max_refreshes=2, fraction=1.0)
    model, x = Cubic(0.3, 0.5), torch.zeros(2, 1)
    past = Past()
    for _ in range(3):
        for iteration in range(5):
            past = policy.revise(past, moved(model, 0.1), iteration, Hessian(), Dense())
        past = policy.absorb(past, EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, x)]), Hessian(), Dense())
        assert past.model.anchor.item() == model.theta.item()
    assert [(event.experience, event.iteration) for event in past.refreshes] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_the_last_refresh_that_is_allowed_says_so():
    policy = AdaptiveRefresh(ALWAYS, every=1, max_refreshes=2, fraction=1.0)
    model, x = Cubic(0.3, 0.5), torch.zeros(2, 1)
    past = absorbed(policy, model, nn.MSELoss(), x, x, Hessian(), Dense())
    for iteration in range(1, 4):
        past = policy.revise(past, moved(model, 0.1), iteration, Hessian(), Dense())
    assert ["the last of 2" in event.reason for event in past.refreshes] == [False, True]


def test_it_looks_every_so_many_iterations():
    policy = AdaptiveRefresh(ALWAYS, every=3, fraction=1.0)
    model, x = Cubic(0.3, 0.5), torch.zeros(2, 1)
    past = absorbed(policy, model, nn.MSELoss(), x, x, Hessian(), Dense())
    for iteration in range(1, 8):
        past = policy.revise(past, moved(model, 0.1), iteration, Hessian(), Dense())
    assert [event.iteration for event in past.refreshes] == [3, 6]


def test_a_past_function_that_grows_is_drawn_anew_before_the_first_step(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 2)))
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    policy = AdaptiveRefresh(AbsoluteError(0.1), fraction=1.0)
    past = absorbed(policy, model, nn.CrossEntropyLoss(), x, y, GGN(), Dense())
    assert policy.revise(past, model, 0, GGN(), Dense()) is past
    old, model[0] = model[0], make_model(lambda: nn.Linear(4, 5))
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = old.weight, old.bias
        grown = nn.functional.cross_entropy(model(x), y).item()
        before = nn.functional.cross_entropy(old(x), y).item()
    assert memory_loss(past.stored, model) == pytest.approx(before)
    revised = policy.revise(past, model, 0, GGN(), Dense())
    (event,) = revised.refreshes
    assert event.reason.startswith(f"growth changed the loss from {before:.3g} to {grown:.3g}: error")
    assert (event.actual, event.predicted) == pytest.approx((grown, before))
    assert revised.model.space.size == 25
    assert revised.loss == pytest.approx(grown)


@pytest.mark.parametrize(
    ("trust", "check", "reason"),
    [
        (AbsoluteError(0.5), TrustCheck(1.0, 2.0, 1.5), None),
        (AbsoluteError(0.4), TrustCheck(1.0, 2.0, 1.5), "error 0.5 above the tolerance 0.4"),
        (RelativeError(0.25), TrustCheck(1.0, 2.0, 1.5), None),
        (RelativeError(0.2), TrustCheck(1.0, 2.0, 1.5), "error 0.5 above 0.2 times the loss 2"),
        (RelativeError(0.2), TrustCheck(3.0, 2.0, 1.5), None),
        (RatioBand(0.5, 2.0), TrustCheck(1.0, 2.0, 1.5), None),
        (RatioBand(0.5, 1.9), TrustCheck(1.0, 2.0, 1.5), r"ratio 2 of actual to predicted change outside \[0.5, 1.9\]"),
        (RatioBand(0.5, 2.0), TrustCheck(1.0, 0.5, 1.5), r"ratio -1 of"),
        (RatioBand(0.5, 2.0), TrustCheck(1.0, 1.09, 0.95), None),
        (RatioBand(0.5, 2.0, floor=0.0), TrustCheck(1.0, 1.5, 1.0), "ratio nan of"),
        (AbsoluteError(0.5), TrustCheck(1.0, math.nan, 1.5), "error nan"),
    ],
)
def test_regions_of_trust_on_paper(trust, check, reason):
    found = trust.broken(check)
    if reason is None:
        assert found is None
    else:
        assert re.match(reason, found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AbsoluteError(0), r"AbsoluteError\(tolerance=...\) must be a finite number, above 0; got 0"),
        (lambda: RelativeError(math.inf), "finite number, above 0; got inf.* infinity is Refresh"),
        (lambda: RatioBand(1.5, 2), "RatioBand needs low < 1 < high; got low=1.5, high=2"),
        (lambda: AdaptiveRefresh(0.1), r"be a Trust; got 0.1. Give a value such as RelativeError\(0.1\), Abs"),
        (lambda: AdaptiveRefresh(look=RandomPart), r"got the class RandomPart. Did you mean RandomPart\(\)\?"),
        (lambda: AdaptiveRefresh(damping=0.1), r"got 0.1. Give a value such as StepBound\(10.0\) or Tikhonov"),
        (lambda: StepBound(0), "above 0; got 0. It counts in lengths of the anchor"),
    ],
)
def test_bad_options_are_named_with_their_remedy(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
