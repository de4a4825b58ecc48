"""The loss that a strategy trains is the loss that is remembered, or the strategy is refused before its first step."""

import pytest
import torch
from torch import nn

from avalanche_curv import GGN, CurvatureEWCPlugin, Diagonal, EmpiricalRisk, estimate


@pytest.fixture(scope="module")
def own():
    """own(**methods): a Naive strategy with methods of its own, which get the strategy."""
    from avalanche.training import Naive

    return lambda **methods: type("Own", (Naive,), methods)


def twice(strategy):
    return strategy._criterion(2 * strategy.mb_output, strategy.mb_y)


OTHER_LOSSES = {
    "a temperature": {"criterion": twice},
    "a factor": {"criterion": lambda self: 0.5 * self._criterion(self.mb_output, self.mb_y)},
    "one per cent": {"criterion": lambda self: 1.01 * self._criterion(self.mb_output, self.mb_y)},
    "a regulariser": {
        "criterion": lambda self: (
            self._criterion(self.mb_output, self.mb_y) + sum(p.square().sum() for p in self.model.parameters())
        )
    },
    "scaled inputs": {"forward": lambda self: self.model(3 * self.mb_x)},
    "scaled inputs as a property": {"mb_x": property(lambda self: 3 * self.mbatch[0])},
    "other labels": {"mb_y": property(lambda self: 1 - self.mbatch[1])},
    "another function": {"forward": lambda self: self.model(self.mb_x) * self.mb_x[:, :1]},
    "no gradient": {"forward": torch.no_grad()(lambda self: self.model(self.mb_x))},
    "one that needs training mode": {"criterion": lambda self: self.made_later},
}


@pytest.mark.parametrize("methods", OTHER_LOSSES.values(), ids=OTHER_LOSSES)
@pytest.mark.parametrize("silent", [False, True], ids=["", "zero head"])
def test_a_strategy_that_trains_another_loss_is_refused_before_a_step(methods, silent, net, own, learner, plane):
    if silent:
        nn.init.zeros_(net[2].weight), nn.init.zeros_(net[2].bias)  # values of the loss say nothing then
    strategy = learner(net, CurvatureEWCPlugin(1.0), kind=own(**methods))
    remedy = r"of its own.*Let the model do.*Nothing was trained on it yet"
    with pytest.raises(TypeError, match=f"Own has {next(iter(methods))} {remedy}"):
        strategy.train(plane.train_stream[0])
    assert strategy.clock.train_iterations == 0


def test_the_error_says_both_losses_and_their_gradients(net, own, learner, plane, examples):
    x, y = examples(plane.train_stream[0])
    value = nn.CrossEntropyLoss()(net(x[:4]), y[:4]).item()
    half, whole = (f"{number:.6f}"[:6] for number in (value / 2, value))
    found, expected = rf"examples {half}\d* with a gradient", rf"of CrossEntropyLoss .* {whole}\d* and"
    strategy = learner(net, CurvatureEWCPlugin(1.0), kind=own(**OTHER_LOSSES["a factor"]))
    with pytest.raises(TypeError, match=f"{found}.*{expected}"):
        strategy.train(plane.train_stream[0])


SAME_LOSS = {
    "written anew": {"criterion": lambda self: nn.functional.cross_entropy(self.mb_output, self.mb_y)},
    "in another order": {"forward": lambda self: self.model[2](self.model[1](self.model[0](self.mb_x)))},
    "with a trace": {"forward": lambda self: setattr(self, "seen", self.mb_x) or self.model(self.mb_x)},
    "drawing": {"forward": lambda self: self.model(self.mb_x + 0 * torch.rand(1))},
}


@pytest.mark.parametrize("methods", SAME_LOSS.values(), ids=SAME_LOSS)
def test_one_that_trains_its_criterion_in_its_own_way_trains_as_without_the_plugin(
    methods, make, own, learner, train, plane, examples
):
    def net():
        return make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))

    plugin, stream = CurvatureEWCPlugin(0.0, curvature=GGN()), plane.train_stream[:1]
    with_plugin = train(learner(net(), plugin, kind=own(**methods)), stream)
    without = train(learner(net(), kind=own(**methods)), stream)
    for here, there in zip(with_plugin.model.parameters(), without.model.parameters()):
        assert torch.equal(here, there)
        assert torch.equal(here.grad, there.grad)
    risk = EmpiricalRisk.snapshot(without.model, nn.CrossEntropyLoss(), [examples(stream[0])])
    torch.testing.assert_close(
        plugin.past.model.curvature.dense(), estimate(GGN(), Diagonal(), risk).curvature.dense(), rtol=1e-5, atol=1e-8
    )


def test_a_forward_under_autocast_is_the_loss_up_to_its_rounding(net, own, learner, plane):
    def forward(self):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(self.mb_x)

    strategy = learner(net, CurvatureEWCPlugin(1.0), kind=own(forward=forward))
    strategy.train(plane.train_stream[0])
    assert strategy.clock.train_exp_counter == 1


def test_methods_of_the_instance_count(net, learner, plane):
    strategy = learner(net, CurvatureEWCPlugin(1.0))
    strategy.criterion = lambda: twice(strategy)
    with pytest.raises(TypeError, match="Naive has criterion of its own and trains another loss"):
        strategy.train(plane.train_stream[0])


def test_the_strategy_and_its_model_are_left_as_found(net, own, learner, plane):
    from avalanche.training.plugins import SupervisedPlugin

    from avalanche_curv.plugins._trained_loss import check_trained_loss

    checked = []

    class Check(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            before, flags = dict(vars(strategy)), [module.training for module in strategy.model.modules()]
            state = torch.random.get_rng_state()
            check_trained_loss(strategy)
            assert vars(strategy) == before
            assert [module.training for module in strategy.model.modules()] == flags
            assert torch.equal(torch.random.get_rng_state(), state)
            assert all(p.grad is None for p in strategy.model.parameters())
            checked.append(True)

    learner(net, Check(), kind=own(**SAME_LOSS["with a trace"])).train(plane.train_stream[0])
    assert checked


def test_a_strategy_whose_loss_changes_later_is_refused_then_and_keeps_the_past(net, own, learner, plane):
    """As Avalanche's FeatureReplay, which trains its criterion first and half of it beside other terms later."""
    plugin = CurvatureEWCPlugin(1.0)
    later = own(criterion=lambda self: self._criterion(self.mb_output, self.mb_y) / (1 + self.clock.train_exp_counter))
    strategy = learner(net, plugin, kind=later)
    strategy.train(plane.train_stream[0])
    steps = strategy.clock.train_iterations
    with pytest.raises(TypeError, match="Own has criterion of its own and trains another loss"):
        strategy.train(plane.train_stream[1])
    assert strategy.clock.train_iterations == steps
    assert plugin.past.experiences == 1


@pytest.mark.parametrize("name", ["DER", "ER_ACE"])
def test_strategies_whose_loop_replays_beside_their_criterion_train(name, net, learner, train, plane):
    from avalanche import training

    plugin = CurvatureEWCPlugin(1.0)
    train(learner(net, plugin, kind=getattr(training, name), mem_size=20, batch_size_mem=10), plane.train_stream[:2])
    assert plugin.past.experiences == 2


def test_a_penalty_that_meta_updates_would_never_see_is_refused(net, learner, plane):
    from avalanche.training import MER

    options = {"kind": MER, "mem_size": 20, "batch_size_mem": 5, "n_inner_steps": 2}
    with pytest.raises(TypeError, match=r"MER learns by meta-updates.*Take strength 0 to measure only"):
        learner(net, CurvatureEWCPlugin(1.0), **options).train(plane.train_stream[0])
    plugin = CurvatureEWCPlugin(0.0)
    learner(net, plugin, **options).train(plane.train_stream[0])
    assert plugin.past.experiences == 1
