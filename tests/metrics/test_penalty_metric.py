import pickle

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    Merge,
    Refresh,
    fidelity_metrics,
    landscape_metrics,
    penalty_metrics,
    projection_metrics,
)


class Direct(SupervisedPlugin):
    """½ Σ C_i δ_i² before every step, by plain operations."""

    def __init__(self, ewc):
        super().__init__()
        self.ewc, self.values = ewc, []

    def before_forward(self, strategy, **kwargs):
        past = self.ewc.past.model
        if past is not None:
            weights = torch.cat([p.detach().reshape(-1) for p in strategy.model.parameters()])
            self.values.append(float(0.5 * (past.curvature.dense().diagonal() * (weights - past.anchor) ** 2).sum()))


@pytest.mark.parametrize("strength", [0.0, 4.0])
@pytest.mark.parametrize("policy", [Merge(), Refresh(0.5)])
def test_penalties_equal_the_quadratic_written_out(strength, policy, net, learner, train, plane):
    ewc = CurvatureEWCPlugin(strength, structure=Diagonal(), policy=policy)
    direct = Direct(ewc)
    strategy = train(learner(net, direct, ewc, metrics=penalty_metrics()), plane.train_stream)
    names = strategy.evaluator.get_all_metrics()
    assert set(names) == {"penalty/raw", "penalty/weighted"}
    assert names["penalty/raw"][0] == names["penalty/weighted"][0] == [3, 4, 5, 6, 7, 8]
    assert names["penalty/raw"][1] == pytest.approx(direct.values, rel=1e-5)
    assert names["penalty/raw"][1][0] == 0  # at the anchor
    assert names["penalty/weighted"][1] == pytest.approx([strength * value for value in direct.values], rel=1e-5)
    assert direct.values[-1] > 0
    assert all(type(value) is float for _, values in names.values() for value in values)


def test_the_loss_is_the_criterion_plus_the_weighted_penalty(net, learner, train, plane):
    added = []

    class Losses(SupervisedPlugin):
        def after_backward(self, strategy, **kwargs):
            added.append(float(strategy.loss.detach() - strategy.criterion().detach()))

    strategy = train(learner(net, CurvatureEWCPlugin(4.0), Losses(), metrics=penalty_metrics()), plane.train_stream)
    weighted = strategy.evaluator.get_all_metrics()["penalty/weighted"][1]
    assert added == pytest.approx([0, 0, 0, *weighted], abs=1e-6)


@pytest.mark.parametrize("structure", [Diagonal(), Dense()])
@pytest.mark.parametrize("schedule", [[0, 0, 3, 3, 0, 5], [4, 2, 0, 0, 1, 0.5]], ids=["from 0 up", "to 0"])
def test_a_strength_that_is_set_acts_at_the_next_step_and_in_the_metrics(
    structure, schedule, net, learner, train, plane
):
    ewc, added, due, slopes = CurvatureEWCPlugin(7.0, structure=structure), [], [], []

    class Scheduled(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            if strategy.experience.current_experience:
                ewc.strength = schedule[len(due)]

        def after_backward(self, strategy, **kwargs):
            past = ewc.past.model
            if past is None:
                return
            task = torch.autograd.grad(strategy.criterion_of_model(), list(net.parameters()))
            slope = past.space.flatten([p.grad - g for p, g in zip(net.parameters(), task)])
            delta = past.displacement(net)
            product = past.curvature.dense() @ delta + (0 if past.gradient is None else past.gradient)
            torch.testing.assert_close(slope, schedule[len(due)] * product, rtol=1e-3, atol=1e-5)
            slopes.append(float(slope.norm()))
            copied = pickle.loads(pickle.dumps(ewc))
            assert copied.regularizer._penalty.guarded.past is copied.past.model  # the guard goes on with what it knows
            added.append(float(strategy.loss.detach() - strategy.criterion().detach()))
            due.append(schedule[len(due)] * float(past(net)))

    strategy = learner(net, ewc, Scheduled(), metrics=[*penalty_metrics(), *landscape_metrics(every=1)])
    strategy.criterion_of_model = lambda: cross_entropy(net(strategy.mb_x), strategy.mb_y)
    train(strategy, plane.train_stream)
    found = strategy.evaluator.get_all_metrics()
    assert added == pytest.approx(due, abs=1e-6)
    assert found["penalty/weighted"][1] == pytest.approx(due, rel=1e-4)
    assert found["gradient/penalty_norm"][1] == pytest.approx(slopes, rel=1e-3, abs=1e-5)
    raw = [value / strength for value, strength in zip(due, schedule) if strength]
    assert [q for q, strength in zip(found["penalty/raw"][1], schedule) if strength] == pytest.approx(raw, rel=1e-4)
    assert max(slopes) > 1e-3


def test_several_plugins_are_numbered(net, learner, train, plane):
    plugins = CurvatureEWCPlugin(1.0), CurvatureEWCPlugin(2.0, policy=Merge(decay=0.5))
    strategy = train(learner(net, *plugins, metrics=penalty_metrics(every=2)), plane.train_stream)
    last = strategy.evaluator.get_last_metrics()
    assert set(last) == {f"{group}/{name}" for group in ("penalty", "penalty_1") for name in ("raw", "weighted")}
    assert last["penalty_1/weighted"] == 2 * last["penalty_1/raw"] != 2 * last["penalty/raw"]


def test_a_strategy_without_a_penalty_publishes_none(net, learner, train, plane):
    strategy = train(learner(net, metrics=penalty_metrics()), plane.train_stream)
    assert strategy.evaluator.get_all_metrics() == {}


@pytest.mark.parametrize("metrics", [fidelity_metrics, landscape_metrics, penalty_metrics, projection_metrics])
def test_every_must_be_at_least_one(metrics):
    with pytest.raises(ValueError, match=r"every must be an integer of at least 1; got 0. 1 measures at each step"):
        metrics(every=0)
