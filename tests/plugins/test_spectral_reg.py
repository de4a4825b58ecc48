"""Spectral regularisation among Avalanche's strategies and plugins."""

import copy

import pytest
import torch
from avalanche.models import IncrementalClassifier
from avalanche.training import Replay
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from torch import nn

from avalanche_curv import (
    CurvatureEWC,
    SpectralReg,
    SpectralRegPlugin,
    SpectralRegularizer,
    load_checkpoint,
    save_checkpoint,
)
from avalanche_curv.plasticity.roles import weight_matrices


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))


def norms(model):
    return [float(torch.linalg.svdvals(matrix)[0]) for matrix in weight_matrices(model).values()]


def weights(strategy):
    return [p.detach().clone() for p in strategy.model.parameters()]


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.02)


@pytest.fixture
def adaptive(learner):
    """A strategy with Adam."""

    def build(*plugins):
        model = network()
        return learner(model, *plugins, optimizer=adam(model), train_epochs=10)

    return build


def test_strength_0_trains_exactly_as_without_the_plugin(adaptive, train, digits):
    stream = digits().train_stream
    plain = adaptive()
    off = adaptive(SpectralRegPlugin(0.0))
    for strategy in (plain, off):
        train(strategy, stream)
    assert all(map(torch.equal, weights(plain), weights(off)))


def test_the_strategy_holds_spectral_norms_that_grow_without_it(adaptive, train, digits):
    stream = digits().train_stream
    plain = adaptive()
    model = network()
    held = SpectralReg(model=model, optimizer=adam(model), strength=1e-1, train_mb_size=20, train_epochs=10)
    for strategy in (plain, held):
        train(strategy, stream)
    assert max(norms(held.model)) < 1.7 < 2 < max(norms(plain.model))
    assert held.spectral.mitigator.steps == held.clock.train_iterations


def test_it_is_what_a_loop_of_ones_own_does(digits, adaptive, train):
    """The plugin and `attach` in a plain loop give the same weights, bit for bit."""
    batches = []

    class Listing(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            batches.append((torch.get_rng_state(), strategy.mb_x.clone(), strategy.mb_y.clone()))

    strategy = train(adaptive(SpectralRegPlugin(1e-2), Listing()), digits().train_stream)
    model = network()
    optimizer = adam(model)
    SpectralRegularizer(1e-2).attach(optimizer, model)
    for state, x, y in batches:
        torch.set_rng_state(state)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), strategy.model.parameters()))


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


def test_avalanches_own_replay_takes_it_as_a_plugin(digits, train):
    model = network()
    strategy = Replay(
        model=model, optimizer=adam(model), criterion=nn.CrossEntropyLoss(), mem_size=20, train_mb_size=16,
        plugins=[SpectralRegPlugin(1e-1)],
    )  # fmt: skip
    train(strategy, digits().train_stream)
    assert max(norms(model)) < 2


def test_heads_that_grow_are_held_too(growing, learner, train):
    model, stream = growing()
    strategy = train(learner(model, SpectralRegPlugin(1.0)), stream.train_stream)
    held = strategy.plugins[0].mitigator
    for name, matrix in weight_matrices(strategy.model).items():
        assert (len(held.pairs[name].u), len(held.pairs[name].v)) == tuple(matrix.shape)
    assert max(norms(strategy.model)) < 1.6


def growing_learner(stream):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), IncrementalClassifier(8))
    return SpectralReg(model=model, optimizer=adam(model), strength=1e-2, every=2, train_mb_size=16)


def test_a_resumed_run_ends_bit_identically(tmp_path, digits):
    stream = digits()
    whole = growing_learner(stream)
    for number, experience in enumerate(stream.train_stream):
        whole.train(experience)
        if number == 1:
            save_checkpoint(whole, tmp_path / "checkpoint.pkl")
    torch.manual_seed(99)
    resumed, done = load_checkpoint(growing_learner(stream), tmp_path / "checkpoint.pkl")
    assert done == 2
    for experience in stream.train_stream[done:]:
        resumed.train(experience)
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    ends = [s.spectral.mitigator.state_dict() for s in (whole, resumed)]
    assert ends[0]["steps"] == ends[1]["steps"]
    for name, vectors in ends[0]["vectors"].items():
        assert all(map(torch.equal, vectors, ends[1]["vectors"][name]))


def test_a_copy_of_the_strategy_goes_its_own_way(digits, adaptive):
    strategy = adaptive(SpectralRegPlugin(1e-2))
    strategy.train(digits().train_stream[0])
    held = strategy.plugins[0].mitigator
    other = copy.deepcopy(held)
    other.penalty(strategy.model)
    assert not torch.equal(other.pairs["0.weight"].u, held.pairs["0.weight"].u)


def test_an_option_that_fits_no_parameter_is_refused_before_training(learner, digits):
    strategy = learner(network(), SpectralRegPlugin(1e-3, exclude=["haed"]))
    before = weights(strategy)
    with pytest.raises(ValueError, match="'haed' selects"):
        strategy.train(digits().train_stream[0])
    assert all(map(torch.equal, before, weights(strategy)))
