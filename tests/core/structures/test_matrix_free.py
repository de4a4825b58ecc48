"""Products without a matrix, from a linearisation that is kept."""

import copy
import pickle

import pytest
import torch
from torch import Size, nn
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
    Merge,
    NonFiniteCurvatureError,
    ParameterSpace,
    Past,
    estimate,
)
from avalanche_curv.core.curvature.operators import GramOperator
from avalanche_curv.core.structures import DiagonalMatrix, MatrixFreeMatrix
from avalanche_curv.core.structures import matrix_free as rules
from avalanche_curv.core.structures.matrix_free import OperatorTerm
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


@pytest.mark.parametrize("batch", [3, 256])
@pytest.mark.parametrize("loss", ["cross_entropy", "mean_square"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_are_those_of_the_dense_matrix(kind, loss, batch, architecture, problem, close, monkeypatch):
    monkeypatch.setattr(rules, "BATCH", batch)
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


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan"), "all"])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction):
    with pytest.raises(ValueError, match=r"MatrixFree needs a fraction in \(0, 1\]"):
        MatrixFree(fraction)


SPACE = ParameterSpace(("weight", "scale", "bias"), (Size((3, 2)), Size(()), Size((3,))))
GROWN = ParameterSpace(("new", "bias", "scale", "weight"), (Size((2,)), Size((5,)), Size(()), Size((5, 2))))
LARGER = ParameterSpace(("new", "bias", "weight", "scale", "last"),
                        (Size((2,)), Size((6,)), Size((5, 2)), Size(()), Size((2,))))  # fmt: skip


def of_rows(seed, size=SPACE.size):
    rows = torch.randn(4, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MatrixFreeMatrix(size, rows.new_empty(0), (OperatorTerm(GramOperator(rows)),)), rows.T @ rows


def test_sums_multiples_and_growth_are_those_of_the_entries(close):
    (one, a), (two, b) = of_rows(0), of_rows(1)
    close(one.plus(two).scaled(-2.5).dense(), -2.5 * (a + b))
    grown = one.plus(two.scaled(0.5)).embedded(SPACE, GROWN)
    where = torch.tensor([8, 9, 10, 11, 12, 13, 7, 2, 3, 4])
    expected = torch.zeros(18, 18).double()
    expected[where[:, None], where] = a + 0.5 * b
    close(grown.dense(), expected)
    third, c = of_rows(2, GROWN.size)
    close(grown.plus(third).dense(), expected + c)
    # new 0-1 | bias 2-7 | weight 8-17 | scale 18 | last 19-20
    where = torch.tensor([0, 1, 2, 3, 4, 5, 6, 18, *range(8, 18)])
    larger = torch.zeros(21, 21).double()
    larger[where[:, None], where] = expected + c
    close(grown.plus(third).embedded(GROWN, LARGER).dense(), larger)
    with pytest.raises(TypeError, match="only another such can be added; got DiagonalMatrix"):
        one.plus(DiagonalMatrix(torch.ones(SPACE.size)))
    with pytest.raises(TypeError, match="not at hand"):
        one.map_spectrum(torch.exp)


def test_merging_scales_the_past(problem, new_problem, net, close):
    risks = [new_problem(net, "cross_entropy", seed=seed).risk for seed in range(3)]
    past = Past()
    for risk in risks:
        past = Merge(0.5).absorb(past, risk, GGN(), MatrixFree())
    separate = [estimate(GGN(), Dense(), risk).curvature.dense() for risk in risks]
    close(past.model.curvature.dense(), 0.25 * separate[0] + 0.5 * separate[1] + separate[2])


def test_nothing_finite_is_refused(new_problem, net):
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteCurvatureError):
        estimate(GGN(), MatrixFree(), new_problem(net, "cross_entropy").risk)


def test_single_precision_agrees(problem):
    known = problem("conv", "cross_entropy")
    batches = [(x.float(), y) for x, y in known.risk.batches]
    single = EmpiricalRisk.snapshot(copy.deepcopy(known.model).float(), known.criterion, batches)
    for kind in KINDS:
        v = random_vectors(known.risk.space.size)[0]
        found = estimate(kind, MatrixFree(), single).curvature.product(v.float())
        expected = estimate(kind, MatrixFree(), known.risk).curvature.product(v)
        assert found.dtype == torch.float32
        assert (found.double() - expected).norm() < 1e-4 * expected.norm()
