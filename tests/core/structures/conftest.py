"""What tests of low rank matrices, alone and in blocks, share."""


import pytest
import torch

from avalanche_curv import (
    Dense,
    estimate,
)
from avalanche_curv.core import eigen
from avalanche_curv.core.structures import low_rank as rules


@pytest.fixture(params=["whole", "rows", "products"])
def way(request, monkeypatch):
    """Which of the three ways is taken."""
    if request.param != "whole":
        monkeypatch.setattr(rules, "WHOLE", 0)
        monkeypatch.setattr(rules, "top_of_matrix", None)
    if request.param == "products":
        monkeypatch.setattr(rules, "GRAM_ROWS", 0)
        monkeypatch.setattr(rules, "top_pairs", None)
        monkeypatch.setattr(eigen, "WHOLE", 0)
    return request.param


@pytest.fixture(scope="session")
def exact():
    """exact(kind, risk): all entries."""
    return lambda kind, risk: estimate(kind, Dense(), risk).curvature.dense()


@pytest.fixture(scope="session")
def best():
    """best(matrix, rank): the nearest of a rank, by the eigenvalues of largest magnitude (Eckart & Young 1936)."""

    def nearest(matrix, rank):
        values, vectors = torch.linalg.eigh(matrix.double())
        top = values.abs().argsort(descending=True)[:rank]
        return (vectors[:, top] * values[top]) @ vectors[:, top].T

    return nearest
