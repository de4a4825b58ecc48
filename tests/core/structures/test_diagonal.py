"""The diagonal of a chain's Hessian, unit by unit, against products, paper, and what is no such chain."""

import math

import pytest
import torch
from torch import nn

from avalanche_curv import Clip, Diagonal, EmpiricalRisk, Fisher, Hessian, estimate
from avalanche_curv.core.structures import diagonal as rule
from avalanche_curv.core.structures.diagonal import diagonal_by_units


def chain(make_model, activation):
    return make_model(
        lambda: nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, 3))
    )


def risk_of(model, criterion=None, targets=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (7,), generator=generator) if targets is None else targets
    return EmpiricalRisk.snapshot(model, criterion or nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])])


def diagonal(kind, risk):
    return estimate(kind, Diagonal(), risk).curvature.values


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Softplus(), nn.ReLU()])
@pytest.mark.parametrize("frozen", [False, True])
def test_unit_by_unit_is_by_products(make_model, activation, frozen, close):
    model = chain(make_model, activation)
    model[0].weight.requires_grad_(not frozen)
    risk = risk_of(model)
    products = Hessian().operator(risk).matmat(torch.eye(risk.space.size, dtype=torch.float64)).diagonal()
    close(diagonal_by_units(risk).values, products)
    close(diagonal(Hessian(), risk), products)


def test_a_smooth_chain_takes_no_products(make_model, monkeypatch):
    monkeypatch.setattr(rule, "by_products", None)
    assert diagonal(Hessian(), risk_of(chain(make_model, nn.Tanh()))).isfinite().all()


def test_the_second_derivative_of_one_unit_is_that_on_paper():
    """ℓ = (tanh(w x) − y)²: ∂²ℓ/∂w² = 2 x² (s² + (t − y) s'), with t = tanh(w x), s = 1 − t² and s' = −2 t s."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    w, x, y = 0.7, 1.5, -2.0
    nn.init.constant_(model[0].weight, w)
    t = math.tanh(w * x)
    s = 1 - t**2
    batch = (torch.tensor([[x]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64))
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [batch])
    found = diagonal(Hessian(), risk).item()
    assert found == pytest.approx(2 * x**2 * (s**2 + (t - y) * (-2 * t * s)))
    assert found < 0
    assert diagonal(Hessian(psd=Clip()), risk).item() == 0


def test_hessian_and_fisher_agree_on_relu_and_not_on_tanh(make_model):
    for activation, equal in ((nn.ReLU(), True), (nn.Tanh(), False)):
        risk = risk_of(chain(make_model, activation))
        pair = diagonal(Hessian(), risk), diagonal(Fisher(), risk)
        assert torch.allclose(*pair, rtol=1e-9, atol=1e-12) == equal


def test_what_is_no_chain_of_linear_layers_goes_by_products(make_model, close):
    twice = nn.Linear(3, 3).double()
    norm = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()
    shared = [nn.Sequential(twice, between, twice) for between in (nn.Tanh(), nn.LeakyReLU())]
    for model in (*shared, norm, nn.Linear(3, 3).double()):
        risk = risk_of(model)
        assert diagonal_by_units(risk) is None
        products = Hessian().operator(risk).matmat(torch.eye(risk.space.size, dtype=torch.float64)).diagonal()
        close(diagonal(Hessian(), risk), products)
    x = torch.zeros(2, 4, 3, dtype=torch.float64)
    tokens = EmpiricalRisk.snapshot(nn.Sequential(nn.Linear(3, 3)).double(), nn.MSELoss(), [(x, x)])
    assert diagonal_by_units(tokens) is None


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh, lambda: nn.Sequential(nn.ReLU6(), nn.Dropout(0.5))]
)
@pytest.mark.parametrize("name", ["cross_entropy", "summed_square", "weighted_binary"])
def test_the_diagonal_of_the_hessian_of_a_piecewise_linear_chain(activation, name, new_problem, make_model, close):
    """Where its shortcut is taken; the matrix off the diagonal is another than that of the GGN."""
    chain = make_model(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), activation(), nn.Linear(5, 3)), seed=1)
    known = new_problem(chain.eval(), name)
    exact = known.paper.hessians.mean(0)
    close(estimate(Hessian(), Diagonal(), known.risk).curvature.dense(), exact.diagonal().diag())
    assert (exact - known.paper.ggns.mean(0)).norm() > 1e-3
