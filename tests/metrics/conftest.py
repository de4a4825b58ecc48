import copy
import random

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture
def assert_resumes(net, learner, train, plane, tmp_path):
    """assert_resumes(metrics, *plugins): saved after two experiences and loaded, a run publishes what it would have
    anyway; or after so many of the parts of a stream."""
    from avalanche_curv import load_checkpoint, save_checkpoint

    def check(metrics, *plugins, stream=plane.train_stream, saved=2, meanwhile=lambda: None, **options):
        strategy = train(learner(net, *plugins, metrics=metrics, **options), stream[:saved])
        meanwhile()
        save_checkpoint(strategy, tmp_path / "checkpoint.pt")
        train(strategy, stream[saved:], seed=1)
        resumed, start = load_checkpoint(learner(copy.deepcopy(net)), tmp_path / "checkpoint.pt")
        assert start == saved
        train(resumed, stream[start:], seed=1)
        assert strategy.evaluator.get_all_metrics() == resumed.evaluator.get_all_metrics()

    return check


@pytest.fixture
def assert_leaves_no_trace(make, learner, train, plane):
    """assert_leaves_no_trace(metrics, plugins=list, loggers=()): with Adam, dropout and batch statistics a run ends
    bit-identically with and without them; `plugins()` makes those of each run."""

    def run(metrics, plugins, loggers=()):
        model = make(
            lambda: nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
        )
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        strategy = learner(model, *plugins, metrics=metrics, optimizer=adam, loggers=loggers)
        train(strategy, plane.train_stream)
        return {
            "model": list(model.state_dict().values()),
            "gradients": [p.grad for p in model.parameters()],
            "optimizer": [value for state in strategy.optimizer.state.values() for value in state.values()],
            "flags": [torch.tensor([module.training for module in model.modules()])],
            "generators": [
                torch.get_rng_state(), torch.tensor(random.getstate()[1]),
                torch.from_numpy(np.random.get_state()[1].astype("int64")),  # noqa: NPY002
            ],
        }  # fmt: skip

    def check(metrics, plugins=list, loggers=()):
        without, measured = run([], plugins()), run(metrics, plugins(), loggers)
        for part, values in without.items():
            assert len(values) == len(measured[part])
            assert all(map(torch.equal, values, measured[part])), part

    return check
