"""How many eigenpairs a part of the trace takes, by each way to them."""

import warnings

import pytest
import torch
from torch import Size

from avalanche_curv import (
    GGN,
    Energy,
    LowRank,
    ParameterSpace,
    estimate,
)
from avalanche_curv.core.curvature.operators import GramOperator


@pytest.mark.parametrize("fraction", [0.3, 0.9, 1.0])
def test_energy_keeps_the_fewest_pairs_that_hold_the_fraction(fraction, way, problem, exact):
    risk = problem("mlp", "mean_square").risk
    values = torch.linalg.eigvalsh(exact(GGN(), risk)).flip(0)
    shares = values.cumsum(0) / values.sum()
    fewest = int((shares < fraction * (1 - 1e-6)).sum()) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = estimate(GGN(), LowRank(Energy(fraction)), risk).curvature
    assert len(matrix.values) == fewest
    assert matrix.trace() >= fraction * float(values.sum()) * (1 - 1e-5)


def test_energy_doubles_its_search_until_the_spectrum_is_held():
    """A flat spectrum of 40 ones: 90 % of the trace are 36 of them."""
    rows, space = torch.eye(40).double(), ParameterSpace(("w",), (Size((40,)),))

    class Risk:
        anchor = torch.zeros(40).double()

    Risk.space = space
    assert len(LowRank(Energy(0.9)).from_operator(GramOperator(rows), Risk()).values) == 36


def test_energy_warns_where_its_limit_leaves_too_little(way, problem):
    risk = problem("mlp", "mean_square").risk
    with pytest.warns(UserWarning, match=r"The top 2 eigenpairs hold .*% of the trace, not 99.0%.*most_pairs"):
        matrix = estimate(GGN(), LowRank(Energy(0.99, most_pairs=2)), risk).curvature
    assert len(matrix.values) == 2
