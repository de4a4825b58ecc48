"""Directions of a low rank matrix, all as stiff as the sharpest."""


import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    Absolute,
    BatchedEmpiricalFisher,
    Clip,
    Dense,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    FlatSpectrum,
    Hessian,
    LowRank,
    Rank,
    estimate,
)


@pytest.mark.parametrize("cut", [Rank(3), Energy(0.8)], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher()], ids=str)
def test_a_flat_spectrum_is_as_stiff_everywhere_as_in_its_sharpest_direction(kind, cut, way, problem, close, exact):
    risk = problem("mlp", "cross_entropy").risk
    values, vectors = torch.linalg.eigh(exact(kind, risk))
    matrix = estimate(kind, FlatSpectrum(LowRank(cut)), risk).curvature
    kept = len(matrix.values)
    assert kept == len(estimate(kind, LowRank(cut), risk).curvature.values)
    top = vectors[:, -kept:]
    close(matrix.dense(), values[-1] * top @ top.T, 1e-4 if way == "products" else 1e-9)


def test_directions_without_curvature_are_not_made_stiff(problem, close):
    """Two mini-batches span two directions, however many are asked for."""
    risk = problem("mlp", "mean_square").risk
    matrix = estimate(BatchedEmpiricalFisher(4), FlatSpectrum(LowRank(Rank(5))), risk).curvature
    values = torch.linalg.eigvalsh(matrix.dense())
    assert int((values > 1e-6 * values[-1]).sum()) == 2


def test_a_flat_spectrum_of_absolute_values_keeps_the_negative_directions_too(problem, close, exact):
    risk = problem("mlp", "cross_entropy").risk
    values, vectors = torch.linalg.eigh(exact(Hessian(), risk))
    top = values.abs().argsort(descending=True)[:12]
    expected = values[top[0]].abs() * vectors[:, top] @ vectors[:, top].T
    close(estimate(Hessian(psd=Absolute()), FlatSpectrum(LowRank(Rank(12))), risk).curvature.dense(), expected, 1e-8)


def test_a_flat_spectrum_of_a_clipped_hessian_is_as_stiff_as_its_largest_positive_eigenvalue() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])
    values = torch.linalg.eigvalsh(estimate(Hessian(), Dense(), risk).curvature.dense())
    found = estimate(Hessian(psd=Clip()), FlatSpectrum(LowRank(Rank(12))), risk).curvature.values
    torch.testing.assert_close(found, found.new_full((len(found),), float(values.max())))
