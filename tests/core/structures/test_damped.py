"""C + τI in every structure against the same written out."""

import pytest
import torch
from torch import nn

from avalanche_curv import GGN, BlockDiagonal, Dense, Diagonal, Kronecker, LowRank, MatrixFree, ParameterSpace, Rank
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.structures.base import DampedMatrix

STRUCTURES = [Dense(), Diagonal(), BlockDiagonal(), LowRank(Rank(3)), Kronecker(), MatrixFree()]
TAU = 0.7


@pytest.fixture(params=STRUCTURES, ids=lambda structure: type(structure).__name__)
def pair(request, problem):
    """A matrix, the same damped, and the damped one written out."""
    matrix = estimate(GGN(), request.param, problem("mlp", "cross_entropy").risk).curvature
    whole = torch.stack([matrix.product(row) for row in torch.eye(matrix.size).double()])
    return matrix, matrix.damped(TAU), whole + TAU * torch.eye(matrix.size).double()


def test_products_forms_and_trace(pair, problem, close):
    matrix, damped, whole = pair
    space = problem("mlp", "cross_entropy").risk.space
    v = torch.randn(matrix.size, generator=torch.Generator().manual_seed(0)).double()
    close(damped.product(v), whole @ v)
    close(torch.cat([part.reshape(-1) for part in damped.products(v, space)]), whole @ v)
    close(damped.quadratic_form(v), v @ whole @ v)
    close(damped.dense(), whole)
    assert damped.trace() == pytest.approx(float(whole.trace()))
    assert damped.is_finite()


def test_scaled_and_summed(pair, close):
    matrix, damped, whole = pair
    v = torch.randn(matrix.size, generator=torch.Generator().manual_seed(1)).double()
    close(damped.scaled(3.0).product(v), 3 * whole @ v)
    close(damped.plus(matrix).product(v), (2 * whole - TAU * torch.eye(len(whole)).double()) @ v)
    close(damped.plus(damped).product(v), 2 * whole @ v)


def test_the_top_pairs(pair):
    _, damped, whole = pair
    values, vectors = damped.top(5)
    expected = torch.linalg.eigvalsh(whole).flip(0)[:5]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vectors @ whole, values[:, None] * vectors, rtol=1e-4, atol=1e-4)


def test_coordinates_that_come_later_are_not_damped(pair, problem, close):
    _, damped, whole = pair
    inner = problem("mlp", "cross_entropy").risk.space
    outer = inner.union(ParameterSpace.of(nn.ModuleDict({"new": nn.Linear(2, 2)})))
    where, wide = outer.positions(inner), torch.zeros(outer.size, outer.size).double()
    wide[where[:, None], where] = whole
    embedded = damped.embedded(inner, outer)
    v = torch.randn(outer.size, generator=torch.Generator().manual_seed(2)).double()
    close(embedded.product(v), wide @ v)
    values, _ = embedded.top(2)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(wide).flip(0)[:2], rtol=1e-5, atol=1e-5)


def test_memory_counts_both(problem):
    matrix = estimate(GGN(), LowRank(Rank(3)), problem("mlp", "cross_entropy").risk).curvature
    damped = matrix.damped(TAU)
    assert isinstance(damped, DampedMatrix)
    assert damped.nbytes == matrix.nbytes + 8 * matrix.size


def test_a_spectrum_is_mended_before_it_is_damped(problem):
    matrix = estimate(GGN(), LowRank(Rank(3)), problem("mlp", "cross_entropy").risk).curvature
    with pytest.raises(TypeError, match="map that of the matrix, and then damp it"):
        matrix.damped(TAU).map_spectrum(torch.relu)
