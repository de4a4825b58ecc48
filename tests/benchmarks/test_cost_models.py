"""The models whose curvature is priced, and which of their parameters peers are shown."""

import torch
from torch import nn

from benchmarks.experiments.cost.experiment import _quick, grid
from benchmarks.experiments.cost.models import LanguageModel
from benchmarks.experiments.cost.peers import PEERS, _parameters
from benchmarks.experiments.languages.gpt import Size

GPT = LanguageModel(Size(1, 8, 2, 4))


def test_each_byte_of_a_window_is_to_be_followed_by_the_next():
    inputs, targets = GPT.examples(5, seed=1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(GPT.examples(5, seed=1)[0], inputs)
    assert nn.CrossEntropyLoss()(GPT.build()(inputs), targets).isfinite()


def test_partial_peers_are_shown_the_parameters_of_the_layers_that_they_know():
    model = GPT.build()
    every, known = _parameters(model, (nn.Module,)), _parameters(model, (nn.Linear, nn.Embedding))
    assert list(every) == [name for name, _ in model.named_parameters()]
    assert {name for name in every if name not in known} == {name for name in every if "norm" in name}


def test_partial_peers_are_asked_about_language_models_alone():
    partial = {peer.title for peer in PEERS if peer.partial}
    asked = {config.label for config in grid() if partial & {tool.title for tool in config.peers}}
    assert asked <= {"GPT over bytes, windows of 32"}


def test_a_quick_run_takes_no_more_examples_than_a_full_one():
    for config in grid():
        quick = {work.name: work.examples for work in _quick(config).works}
        assert all((quick[work.name] or 0) <= (work.examples or 0) for work in config.works)
