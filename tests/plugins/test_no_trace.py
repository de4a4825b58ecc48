import random

import numpy as np
import pytest
import torch
from avalanche.benchmarks.utils import make_avalanche_dataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from torch import nn

from avalanche_curv import (
    GGN,
    Accumulate,
    AdaptiveRefresh,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Merge,
    Refresh,
    RelativeError,
    SineBoundary,
    fidelity_metrics,
)
from avalanche_curv.plugins import _batches

# Strength 0 and measurements must leave no trace: not in the model, not in the optimizer, not in random states.

OPTIONS = [
    (Fisher(), Diagonal(), Accumulate()),
    (Fisher(samples=2, seed=1), BlockDiagonal(), Accumulate(fraction=0.5)),
    (BatchedEmpiricalFisher(batch_size=20), Diagonal(), Accumulate()),
    (EmpiricalFisher(), BlockDiagonal(), Merge(decay=0.9)),
    (GGN(), Dense(), Refresh(fraction=0.5, gradient=True)),
    (Hessian(psd=Clip()), Dense(), Refresh()),
    (GGN(), Diagonal(), AdaptiveRefresh(RelativeError(0.01), every=1, fraction=0.5)),
]


def noise(x):
    """Draws from every global random state."""
    return x + 0.1 * torch.randn(x.shape) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002


@pytest.fixture(scope="module")
def noisy():
    """Random transforms in training, and in evaluation too."""
    benchmark = SineBoundary(3, examples=40, seed=0)
    groups = TransformGroups({"train": (noise, None), "eval": (noise, None)})
    for stream in benchmark.streams.values():
        for experience in stream:
            experience._dataset = make_avalanche_dataset(experience.dataset, transform_groups=groups)
    return benchmark


def trace(strategy):
    generators = torch.get_rng_state(), np.random.get_state()[1:], random.getstate()  # noqa: NPY002
    return {
        "model": strategy.model.state_dict(),
        "gradients": [p.grad for p in strategy.model.parameters()],
        "optimizer": strategy.optimizer.state_dict(),
        "training": [module.training for module in strategy.model.modules()],
        "generators": generators,
        "loss": strategy.loss,
    }


def assert_identical(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert (a == b).all()
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_identical(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module")
def run(make, learner, train, noisy):
    def trained(*plugins, metrics=(), eval_every=-1):
        model = make(
            lambda: nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
        )
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        strategy = learner(model, *plugins, metrics=metrics, optimizer=adam, train_mb_size=10, eval_every=eval_every)
        return trace(train(strategy, noisy.train_stream))

    return trained


@pytest.fixture(scope="module")
def naive(run):
    return run()


@pytest.mark.parametrize(("curvature", "structure", "policy"), OPTIONS)
def test_strength_zero_trains_bit_identically_to_naive(run, naive, curvature, structure, policy):
    plugin = CurvatureEWCPlugin(0.0, curvature=curvature, structure=structure, policy=policy)
    assert_identical(run(plugin), naive)
    assert plugin.past.experiences == 3


def test_a_positive_strength_does_not(run, naive):
    with pytest.raises(AssertionError):
        assert_identical(run(CurvatureEWCPlugin(1.0)), naive)


@pytest.mark.parametrize("on_test_stream", [True, False])
def test_measuring_fidelity_trains_bit_identically_to_naive(run, naive, noisy, on_test_stream):
    stream = noisy.test_stream if on_test_stream else None
    assert_identical(run(metrics=fidelity_metrics(every=1, fraction=0.5, stream=stream)), naive)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_evaluation_amid_training_does_not_change_that(run, noisy, eval_every):
    metrics = fidelity_metrics(every=1, fraction=0.5, stream=noisy.test_stream)
    plugin = CurvatureEWCPlugin(0.0, policy=Refresh(fraction=0.5))
    assert_identical(run(plugin, metrics=metrics, eval_every=eval_every), run(eval_every=eval_every))


def test_data_that_are_loaded_at_every_pass_leave_no_trace_either(run, naive, monkeypatch):
    monkeypatch.setattr(_batches, "IN_MEMORY_BYTES", 0)
    plugin = CurvatureEWCPlugin(0.0, curvature=GGN(), structure=Dense(), batch_size=7)
    assert_identical(run(plugin, metrics=fidelity_metrics(every=2, fraction=1.0)), naive)
