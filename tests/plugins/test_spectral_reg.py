"""Spectral regularisation among Avalanche's strategies and plugins."""

import copy

import torch
from avalanche.training.plugins import ReplayPlugin
from torch import nn

from avalanche_curv import (
    CurvatureEWC,
    SpectralReg,
    SpectralRegPlugin,
    SpectralRegularizer,
)
from avalanche_curv.plasticity.roles import weight_matrices


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))


def norms(model):
    return [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in weight_matrices(model).values()]


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.02)


def test_the_strategy_holds_spectral_norms_that_grow_without_it(learner, train, digits):
    stream = digits().train_stream
    model = network()
    plain = learner(model, optimizer=adam(model), train_epochs=10)
    model = network()
    held = SpectralReg(model=model, optimizer=adam(model), strength=1e-1, train_mb_size=20, train_epochs=10)
    for strategy in (plain, held):
        train(strategy, stream)
    assert max(norms(held.model)) < 1.7 < 2 < max(norms(plain.model))
    assert held.spectral.mitigator.steps == held.clock.train_iterations


def test_it_composes_with_curvature_ewc_and_replay(digits, train):
    """All three in one strategy: a past is remembered, examples are replayed, and spectral norms are held."""
    found = {}
    for strength in (0.0, 1e-1):
        model = network()
        strategy = CurvatureEWC(
            model=model, optimizer=adam(model), strength=1.0, train_mb_size=16, train_epochs=10,
            plugins=[ReplayPlugin(mem_size=40), SpectralRegPlugin(strength)],
        )  # fmt: skip
        train(strategy, digits().train_stream)
        assert strategy.ewc.past.experiences == 3
        assert len(strategy.plugins[0].storage_policy.buffer) == 40
        found[strength] = max(norms(model))
    assert found[1e-1] < 1.7 < 2 < found[0.0]


def test_heads_that_grow_are_held_too(growing, learner, train):
    model, stream = growing()
    strategy = train(learner(model, SpectralRegPlugin(1.0)), stream.train_stream)
    held = strategy.plugins[0].mitigator
    for name, matrix in weight_matrices(strategy.model).items():
        assert (len(held.pairs[name].u), len(held.pairs[name].v)) == tuple(matrix.shape)
    assert max(norms(strategy.model)) < 1.6
    copied = copy.deepcopy(held)  # which goes its own way
    copied.penalty(strategy.model)
    assert any(not torch.equal(copied.pairs[name].u, held.pairs[name].u) for name in held.pairs)


def test_the_options_of_the_plugin_are_those_of_the_regulariser():
    options = {"exponent": 3.0, "every": 2, "include": ("*.weight",), "exclude": ("head",), "seed": 7}
    ours, theirs = SpectralRegPlugin(0.5, **options).mitigator, SpectralRegularizer(0.5, **options)
    for name in ("strength", "exponent", "every", "selection", "seed"):
        assert getattr(ours, name) == getattr(theirs, name)
