"""What tests of several streams share."""

import random

import numpy as np
import pytest
import torch


def _parts(experience):
    inputs, targets, labels = zip(*experience.dataset)
    return torch.stack(inputs), torch.tensor(targets), torch.tensor(labels)


@pytest.fixture(scope="session")
def tensors():
    """tensors(experience) -> (inputs, targets, task labels)."""
    return _parts


@pytest.fixture(scope="session")
def equal():
    """equal(a, b): whether two benchmarks hold the same examples in the same order."""

    def everything(benchmark):
        return [part for stream in benchmark.streams.values() for e in stream for part in _parts(e)]

    return lambda a, b: all(torch.equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))


@pytest.fixture
def random_states():
    """Checks after the test that no global random state has moved."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
