"""Products without a matrix, from a linearisation that is kept."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from avalanche_curv import (
    GGN,
    Absolute,
    BatchedEmpiricalFisher,
    Clip,
    Dense,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    MatrixFree,
    estimate,
)
from avalanche_curv.core.structures import matrix_free as rules
from avalanche_curv.core.structures.rules import check_pair

KINDS = [EmpiricalFisher(), Fisher(), Fisher(samples=2, seed=1), GGN(), BatchedEmpiricalFisher(2), Hessian()]


def vision_transformer():
    model = VisionTransformer(8, 4, 1, 2, 4, 6, num_classes=3)
    for parameter in (model.class_token, *model.heads.parameters()):
        nn.init.normal_(parameter, std=0.5)  # zero at first
    return model


@pytest.fixture(scope="session")
def attention(make_model):
    generator = torch.Generator().manual_seed(0)
    model = make_model(vision_transformer).eval()
    inputs = torch.randn(5, 3, 8, 8, generator=generator).double()
    targets = torch.randint(3, (5,), generator=generator)
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), list(zip(inputs.split(3), targets.split(3))))


def random_vectors(size, count=3):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("loss", ["cross_entropy", "mean_square"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_are_those_of_the_dense_matrix(kind, loss, architecture, problem, close, monkeypatch):
    monkeypatch.setattr(rules, "BATCH", 3)  # of seven examples
    risk = problem(architecture, loss).risk
    matrix, whole = (estimate(kind, structure, risk).curvature for structure in (MatrixFree(), Dense()))
    for v in random_vectors(matrix.size):
        close(matrix.product(v), whole.product(v))
        close(matrix.quadratic_form(v), whole.quadratic_form(v))
    close(matrix.dense(), whole.dense())
    assert matrix.trace() == pytest.approx(whole.trace())
    close(matrix.top(2)[0], whole.top(2)[0], 1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_through_attention_are_those_of_the_dense_matrix(kind, attention, close):
    matrix, whole = (estimate(kind, structure, attention).curvature for structure in (MatrixFree(), Dense()))
    for v in random_vectors(matrix.size):
        close(matrix.product(v), whole.product(v))


def test_a_linear_model_and_frozen_parameters(new_problem, make_model, close):
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    model[0].requires_grad_(False)
    risk = new_problem(model, "cross_entropy").risk
    for kind in KINDS:
        matrix, whole = (estimate(kind, structure, risk).curvature for structure in (MatrixFree(), Dense()))
        close(matrix.dense(), whole.dense())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_parameter_that_is_not_used_has_no_curvature(kind, new_problem, make_model, close):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.used = nn.Linear(2, 2), nn.Linear(4, 3)

        def forward(self, inputs):
            return self.used(inputs)

    risk = new_problem(make_model(Idle), "mean_square").risk
    matrix, whole = (estimate(kind, structure, risk).curvature for structure in (MatrixFree(), Dense()))
    close(matrix.dense(), whole.dense())
    assert not matrix.dense()[:6].any()


@pytest.mark.parametrize("kind", [GGN(), Fisher(samples=2, seed=1), Hessian(), BatchedEmpiricalFisher(2)], ids=str)
def test_a_fraction_is_the_curvature_of_the_examples_that_a_risk_draws_by_the_same_seed(kind, problem, close):
    risk = problem("mlp", "cross_entropy").risk
    v = random_vectors(risk.space.size)[0]
    found = estimate(kind, MatrixFree(0.5, seed=3), risk).curvature.product(v)
    close(found, estimate(kind, Dense(), risk.subset(0.5, 3)).curvature.product(v))
    assert (found - estimate(kind, MatrixFree(0.5, seed=4), risk).curvature.product(v)).norm() > 1e-6


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_survive_copies_and_files_which_hold_no_graphs(kind, problem, close):
    model = estimate(kind, MatrixFree(), problem("conv", "cross_entropy").risk)
    fresh = len(pickle.dumps(model))
    v = random_vectors(model.space.size)[0]
    expected = model.curvature.product(v)  # its graphs are made now
    assert len(pickle.dumps(model)) <= fresh * 1.01 + 200
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        close(other.curvature.product(v), expected)
        close(other.anchor, model.anchor)


def test_the_model_may_go_on_training(new_problem, net, close):
    risk = new_problem(net, "cross_entropy").risk
    model = estimate(GGN(), MatrixFree(), risk)
    v = random_vectors(model.space.size)[0]
    whole = estimate(GGN(), Dense(), risk).curvature.product(v)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1.0
    close(model.curvature.product(v), whole)
    assert all(p.grad is None for p in (*net.parameters(), *risk.base.parameters()))


def test_the_penalty_has_the_exact_gradient(new_problem, net, close):
    past = estimate(Hessian(), MatrixFree(), new_problem(net, "cross_entropy").risk, gradient=True)
    whole = past.curvature.dense()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1
    delta = past.displacement(net)
    penalty = past.penalty(net)
    penalty.backward()
    close(penalty, past.gradient @ delta + 0.5 * delta @ whole @ delta)
    close(torch.cat([p.grad.reshape(-1) for p in net.parameters()]), past.gradient + whole @ delta)


@pytest.mark.parametrize("psd", [Clip(), Absolute()], ids=str)
def test_a_hessian_to_be_mended_is_refused_when_it_is_asked_for(psd, problem):
    for ask in (
        lambda: estimate(Hessian(psd), MatrixFree(), problem("mlp", "cross_entropy").risk),
        lambda: check_pair(Hessian(psd), MatrixFree()),
    ):
        with pytest.raises(TypeError, match=r"cannot be mended where only products are known. Use Hessian\(\) or GGN"):
            ask()
