"""What the Fisher is, and what the empirical Fisher is not (Kunstner et al. 2019, arXiv:1905.12558)."""


import pytest
import torch
from torch import nn

from avalanche_curv import GGN, Dense, EmpiricalFisher, EmpiricalRisk, Fisher, Hessian, estimate


@pytest.fixture(scope="module")
def misfit():
    """A trained line through points of a parabola, y = x², x = −2, …, 2: slope 0, intercept 2."""
    x = torch.linspace(-2, 2, 5).double()[:, None]
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.0), model.bias.fill_(2.0)
    return EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x[:3], x[:3] ** 2), (x[3:], x[3:] ** 2)])


def dense(kind, risk):
    return estimate(kind, Dense(), risk).curvature.dense()


def test_the_line_is_trained(misfit, close):
    close(misfit.gradient(), torch.zeros(2).double())


@pytest.mark.parametrize("kind", [Fisher(), GGN(), Hessian()], ids=str)
def test_fisher_ggn_and_hessian_are_second_moments_of_the_inputs(kind, misfit, close):
    """2 · mean [x², x; x, 1] = [4, 0; 0, 2], whatever the targets."""
    close(dense(kind, misfit), torch.tensor([[4.0, 0.0], [0.0, 2.0]]).double())


def test_the_empirical_fisher_weighs_them_with_squared_residuals(misfit, close):
    """4 · mean r² [x², x; x, 1] with r = 2 − x² = −2, 1, 2, 1, −2: it has forgotten that curvature is larger in x."""
    close(dense(EmpiricalFisher(), misfit), torch.tensor([[27.2, 0.0], [0.0, 11.2]], dtype=torch.float64))


def test_the_empirical_fisher_vanishes_where_the_fit_is_perfect(close):
    x = torch.linspace(-2, 2, 5).double()[:, None]
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(3.0), model.bias.fill_(1.0)
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, 3 * x + 1)])
    assert dense(EmpiricalFisher(), risk).abs().max() < 1e-28
    close(dense(Fisher(), risk), torch.tensor([[4.0, 0.0], [0.0, 2.0]]).double())


@pytest.mark.parametrize("loss", ["cross_entropy", "mean_square"])
def test_sampled_labels_have_the_fisher_as_their_mean(loss, problem):
    """Over 200 seeds, to five standard errors in every entry."""
    risk = problem("mlp", loss).risk
    draws = torch.stack([dense(Fisher(samples=1, seed=seed), risk) for seed in range(200)])
    error = (draws.mean(0) - dense(Fisher(), risk)).abs()
    assert (error <= 5 * draws.std(0) / 200**0.5 + 1e-12).all()
