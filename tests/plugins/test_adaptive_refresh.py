import logging
import math

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from avalanche_curv import (
    GGN,
    AbsoluteError,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    NonFiniteCurvatureError,
    Past,
    Rank,
    Refresh,
    RelativeError,
    RescaleIfUnstable,
    StopIfUnstable,
    Tikhonov,
    UnstablePenaltyError,
    estimate,
    landscape_metrics,
    penalty_metrics,
)
from avalanche_curv.core.quadratic.adaptive import memory_loss, predicted_loss
from avalanche_curv.plugins import _batches, _bridge


def adaptive(strength=1.0, trust=RelativeError(2e-3), structure=Dense(), **options):  # noqa: B008
    policy = AdaptiveRefresh(trust, every=1, fraction=0.5, **options)
    return CurvatureEWCPlugin(strength, curvature=GGN(), structure=structure, policy=policy)


def test_every_refresh_happens_where_the_error_crossed_and_is_logged_with_its_reason(
    net, learner, train, plane, caplog
):
    ewc = adaptive()
    with caplog.at_level(logging.INFO, logger="avalanche_curv"):
        strategy = train(learner(net, ewc, metrics=penalty_metrics(), train_epochs=5), plane.train_stream)
    events = ewc.past.refreshes
    assert events
    assert all(event.error > 2e-3 * event.actual for event in events)
    assert {event.experience for event in events} <= {1, 2}
    assert [record.getMessage() for record in caplog.records] == [
        f"Refresh in experience {e.experience} after {e.iteration} updates: {e.reason}" for e in events
    ]
    metrics = strategy.evaluator.get_all_metrics()
    assert metrics["penalty/refreshes"][1][-1] == len(events)
    assert metrics["penalty/error"][1] == pytest.approx([event.error for event in events])
    assert metrics["penalty/error"][0] == [15 * e.experience + e.iteration - 1 for e in events]


def test_the_picture_stays_within_its_tolerance_while_a_refresh_at_the_end_alone_leaves_it(
    net, learner, train, plane
):
    errors = {}

    class Watch(CurvatureEWCPlugin):
        def after_update(self, strategy, **kwargs):
            super().after_update(strategy, **kwargs)
            if self.past.model is not None:
                loss = memory_loss(self.past.stored, strategy.model)
                gap = abs(loss - predicted_loss(self.past, strategy.model)) / loss
                errors.setdefault(self.policy.max_refreshes, []).append(gap)

    for cap in (0, None):
        policy = AdaptiveRefresh(RelativeError(2e-3), every=1, max_refreshes=cap, fraction=0.5)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
        model.load_state_dict(net.state_dict())
        train(learner(model, Watch(1.0, curvature=GGN(), policy=policy), train_epochs=5), plane.train_stream)
    assert max(errors[None]) <= 2e-3 < max(errors[0])


@pytest.mark.parametrize("structure", [Dense(), LowRank(Rank(3), max_rank=6)])
def test_a_growing_model_is_drawn_anew_before_each_experience_that_changes_its_past(
    growing, learner, train, structure
):
    model, benchmark = growing()
    ewc = adaptive(trust=AbsoluteError(1e-3), structure=structure)
    train(learner(model, ewc), benchmark.train_stream)
    grown = [event for event in ewc.past.refreshes if event.iteration == 0]
    assert grown
    assert all(event.reason.startswith("growth changed the loss from") for event in grown)
    assert ewc.past.model.space.size == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "structure", [Dense(), Diagonal(), LowRank(Rank(4)), Kronecker(), MatrixFree(), BlockDiagonal()]
)
def test_training_takes_the_gradient_of_the_newest_picture_and_its_damping(
    make, double, learner, train, digits, structure
):
    """∇task + strength · (g + (C + τI) δ), written out at every step, also right after a refresh."""
    model = make(lambda: nn.Sequential(nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 10)).double())
    ewc = adaptive(2.0, trust=AbsoluteError(1e-9), structure=structure, damping=Tikhonov(0.3), max_refreshes=3)
    errors = []

    class Check(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            if ewc.past.model is None:
                return
            models = [estimate(GGN(), structure, risk, gradient=True) for risk in ewc.past.stored]
            delta = flat(model.parameters()) - ewc.past.stored[-1].anchor
            penalty = sum(m.gradient + m.curvature.product(delta) for m in models) + 0.3 * delta
            task = torch.autograd.grad(cross_entropy(model(strategy.mb_x), strategy.mb_y), list(model.parameters()))
            expected = flat(task) + 2.0 * penalty
            errors.append(float((flat(p.grad for p in model.parameters()) - expected).norm() / expected.norm()))

    train(learner(model, ewc, Check(), train_epochs=2), digits(dtype=torch.float64).train_stream[:2])
    assert len(ewc.past.refreshes) == 3
    assert len(errors) == 6
    assert max(errors) < 1e-9


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def test_the_gradients_that_are_measured_are_those_of_the_rescaled_penalty(make, learner, train, plane):
    model = make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))
    ewc = CurvatureEWCPlugin(1000.0, curvature=GGN(), structure=Dense(), guard=RescaleIfUnstable(0.1))
    norms = []

    class Spy(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            if ewc.past.model is not None:
                task = torch.autograd.grad(cross_entropy(model(strategy.mb_x), strategy.mb_y), list(model.parameters()))
                norms.append(float(flat(task).norm()))

    strategy = learner(model, ewc, Spy(), metrics=landscape_metrics(every=1, curvature=EmpiricalFisher()))
    train(strategy, plane.train_stream[:2])
    assert ewc.weight < ewc.strength
    assert strategy.evaluator.get_all_metrics()["gradient/task_norm"][1][-3:] == pytest.approx(norms, rel=1e-3)


def test_parameters_that_are_frozen_later_are_measured_on(net, learner, train, plane):
    ewc = adaptive()
    strategy = train(learner(net, ewc, metrics=landscape_metrics(every=1)), plane.train_stream[:1])
    net[0].weight.requires_grad_(False)
    strategy.train(plane.train_stream[1])
    assert strategy.evaluator.get_last_metrics()["gradient/penalty_norm"] > 0


def test_a_rate_that_rises_later_is_seen_by_the_guard(net, learner, train, plane):
    class WarmUp(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            late = strategy.clock.train_exp_iterations >= 2
            strategy.optimizer.param_groups[0]["lr"] = 0.1 if late else 1e-5

    ewc = CurvatureEWCPlugin(1000.0, curvature=GGN(), structure=Dense(), guard=StopIfUnstable())
    strategy = train(learner(net, ewc, WarmUp()), plane.train_stream[:1])
    with pytest.raises(UnstablePenaltyError):
        strategy.train(plane.train_stream[1])
    assert strategy.clock.train_exp_iterations == 2


@pytest.mark.parametrize("policy", [
    AdaptiveRefresh(fraction=0.25, seed=3), Refresh(0.25, 3), Accumulate(0.25, 3), Merge(0.9, 0.25, 3)
])  # fmt: skip
def test_only_what_a_policy_keeps_is_loaded_at_the_end(net, learner, train, plane, monkeypatch, policy):
    loaded = []
    monkeypatch.setattr(_batches, "loader", lambda data, size: loaded.append(len(data)) or DataLoader(data, size))
    parts, others = [], []

    class Spy(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            loaded.clear()

        def after_training_exp(self, strategy, **kwargs):
            parts.append(max(loaded))
            whole = _bridge.current_risk(strategy, 256)
            others.append(policy.absorb(others[-1] if others else Past(), whole, ewc.curvature, ewc.structure))
            torch.testing.assert_close(ewc.past.model.curvature.dense(), others[-1].model.curvature.dense())

    ewc = CurvatureEWCPlugin(0.0, policy=policy)
    train(learner(net, ewc, Spy()), plane.train_stream)
    assert parts == [12, 12, 12]


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_an_online_stream_counts_updates_and_refreshes_by_task(net, learner, train, plane, every):
    from avalanche.benchmarks.scenarios import split_online_stream

    stream = split_online_stream(plane.train_stream, experience_size=10, access_task_boundaries=True)
    policy = AdaptiveRefresh(AbsoluteError(1e-9), every=every, max_refreshes=2, fraction=0.5)
    ewc = CurvatureEWCPlugin(1.0, curvature=GGN(), policy=policy)
    train(learner(net, ewc, train_mb_size=5), stream)  # 10 updates a task
    assert ewc.past.experiences == 3
    found = [(event.experience, event.iteration) for event in ewc.past.refreshes]
    expected = {1: [1, 2], 4: [4, 8], 1000: []}[every]
    assert found == [(task, iteration) for task in (1, 2) for iteration in expected]


def test_metrics_count_the_iterations_of_an_online_stream_from_its_start(net, learner, train, plane):
    from avalanche.benchmarks.scenarios import split_online_stream

    stream = split_online_stream(plane.train_stream, experience_size=10, access_task_boundaries=True)
    metrics = landscape_metrics(every=7, curvature=EmpiricalFisher())
    strategy = train(learner(net, metrics=metrics, train_mb_size=5), stream)
    assert strategy.evaluator.get_all_metrics()["gradient/task_norm"][0] == [0, 7, 14, 21, 28]


def test_a_diverged_model_is_named_and_the_past_is_kept(net, learner, train, plane):
    ewc = adaptive()
    strategy = train(learner(net, ewc), plane.train_stream[:1])
    kept = ewc.past
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteCurvatureError, match=r"Experience 1: .* 1 experiences before it is kept"):
        strategy.train(plane.train_stream[1])
    assert ewc.past is kept


def test_guards_act_before_the_first_step_that_would_diverge(make, learner, train, plane):
    def trained(guard):
        model = make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))
        ewc = CurvatureEWCPlugin(1000.0, curvature=GGN(), structure=Dense(), guard=guard)
        learned = learner(model, ewc, metrics=penalty_metrics(), train_epochs=20)
        return ewc, model, train(learned, plane.train_stream[:2])

    ewc, model, strategy = trained(RescaleIfUnstable(0.5))
    assert ewc.strength == 1000
    assert ewc.weight < 100
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in model.parameters())
    metrics = strategy.evaluator.get_last_metrics()
    assert metrics["penalty/weighted"] == pytest.approx(ewc.weight * metrics["penalty/raw"])
    with pytest.raises(UnstablePenaltyError, match="strength 1e\\+03"):
        trained(StopIfUnstable())
    warned = pytest.warns(UserWarning, match="descent on the penalty alone diverges")
    with warned, pytest.raises(NonFiniteCurvatureError, match="Look for diverged weights"):
        trained(CurvatureEWCPlugin(1.0).guard)


def test_a_guard_is_an_object():
    expected = r"guard must be a Guard; got 'warn'. Give a value such as WarnIfUnstable\(\), .* or None"
    with pytest.raises(TypeError, match=expected):
        CurvatureEWCPlugin(1.0, guard="warn")
