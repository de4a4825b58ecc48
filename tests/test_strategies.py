import copy

import torch
from avalanche.training import Naive
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import GGN, Accumulate, CurvatureEWC, CurvatureEWCPlugin, Dense, Diagonal, Fisher, Refresh

OPTIONS = {"curvature": GGN(), "structure": Dense(), "policy": Refresh(fraction=0.5, gradient=True)}


def test_it_is_naive_with_the_plugin(net, learner, train, plane):
    plugin = CurvatureEWCPlugin(2.0, **OPTIONS)
    by_hand = train(learner(copy.deepcopy(net), plugin, kind=Naive), plane.train_stream)
    ready = train(learner(net, kind=CurvatureEWC, strength=2.0, **OPTIONS), plane.train_stream)
    for ours, theirs in zip(ready.model.parameters(), by_hand.model.parameters()):
        assert torch.equal(ours, theirs)
    assert torch.equal(ready.ewc.past.model.curvature.dense(), plugin.past.model.curvature.dense())
    assert (ready.ewc.strength, ready.ewc.curvature, ready.ewc.structure) == (2.0, GGN(), Dense())
    assert ready.ewc.policy == OPTIONS["policy"]


def test_defaults_are_those_of_kirkpatrick(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    strategy = CurvatureEWC(model=net, optimizer=optimizer, strength=1.0, evaluator=None)
    assert (strategy.ewc.curvature, strategy.ewc.structure, strategy.ewc.policy) == (Fisher(), Diagonal(), Accumulate())
    assert isinstance(strategy._criterion, nn.CrossEntropyLoss)
    assert strategy.plugins[0] is strategy.ewc


def test_the_plugins_of_the_caller_come_first_and_their_list_is_left_alone(net):
    class Other(SupervisedPlugin):
        pass

    plugins = [Other()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    made = [
        CurvatureEWC(model=net, optimizer=optimizer, strength=1.0, plugins=plugins, evaluator=None) for _ in range(2)
    ]
    assert len(plugins) == 1
    assert [strategy.plugins[:2] for strategy in made] == [[plugins[0], strategy.ewc] for strategy in made]


def test_options_of_the_base_strategy_reach_it(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    strategy = CurvatureEWC(
        model=net, optimizer=optimizer, strength=1.0, evaluator=None,
        train_mb_size=7, train_epochs=3, eval_mb_size=11, eval_every=2, peval_mode="iteration",
    )
    assert (strategy.train_mb_size, strategy.train_epochs, strategy.eval_mb_size) == (7, 3, 11)
    assert strategy.eval_every == 2
