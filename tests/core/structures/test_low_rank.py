"""The top of the spectrum: three ways to it, how much is kept, and sums."""

import copy
import warnings

import pytest
import torch
from torch import Size, nn

from avalanche_curv import (
    GGN,
    Absolute,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    Fisher,
    FlatSpectrum,
    Hessian,
    LowRank,
    ParameterSpace,
    PerLayer,
    Rank,
    estimate,
)
from avalanche_curv.core import eigen
from avalanche_curv.core.fidelity.examples import OutputModels
from avalanche_curv.core.fidelity.monitor import example_models
from avalanche_curv.core.per_example import gram
from avalanche_curv.core.structures.low_rank import LowRankMatrix
from avalanche_curv.core.structures.rules import check_pair

KINDS = [GGN(), Fisher(), Fisher(samples=2, seed=1), EmpiricalFisher(), BatchedEmpiricalFisher(2), Hessian()]


@pytest.mark.parametrize(("architecture", "loss"), [("mlp", "cross_entropy"), ("conv", "mean_square")])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_way_gives_the_top_eigenpairs_of_the_whole_matrix(kind, loss, way, architecture, problem, close, exact):
    risk = problem(architecture, loss).risk
    matrix = estimate(kind, LowRank(Rank(3)), risk).curvature
    whole = exact(kind, risk)
    values = torch.linalg.eigvalsh(whole)
    values = values[values.abs().argsort(descending=True)][:3]
    tolerance = 1e-5 if way == "products" else 1e-9
    close(matrix.values, values, tolerance)
    close(matrix.vectors @ matrix.vectors.T, torch.eye(3).double(), tolerance)
    residual = whole @ matrix.vectors.T - matrix.vectors.T * matrix.values
    assert residual.norm(dim=0).le((1e-4 if way == "products" else 1e-9) * values.abs()).all()
    assert matrix.trace() == pytest.approx(float(values.sum()), rel=1e-5)


@pytest.mark.parametrize("kind", [GGN(), Fisher(samples=2, seed=1), EmpiricalFisher()], ids=str)
def test_products_with_rows_that_are_held_are_those_of_the_whole_matrix(
    kind, architecture, problem, close, exact, monkeypatch
):
    risk = problem(architecture, "cross_entropy").risk
    monkeypatch.setattr("avalanche_curv.core.per_example.passes.CHUNK", 3)
    operator = gram.rows_operator(kind, risk)
    vectors = torch.randn(risk.space.size, 3, generator=torch.Generator().manual_seed(0)).double()
    close(operator.matmat(vectors), exact(kind, risk) @ vectors, 1e-12)
    for limit in ("GRAM_BYTES", "FEW_COLUMNS"):
        with monkeypatch.context() as context:
            context.setattr(gram, limit, 0)
            assert gram.rows_operator(kind, risk) is None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_single_precision_agrees_to_five_digits(kind, way, make_model, exact, best):
    generator = torch.Generator().manual_seed(0)
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = torch.randn(7, 4, generator=generator).double(), torch.randint(3, (7,), generator=generator)
    double = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])
    single = EmpiricalRisk.snapshot(copy.deepcopy(model).float(), nn.CrossEntropyLoss(), [(x.float(), y)])
    found = estimate(kind, LowRank(Rank(3)), single).curvature
    expected = best(exact(kind, double), 3)
    assert found.vectors.dtype == found.values.dtype == torch.float32
    assert (found.dense().double() - expected).norm() < (2e-4 if way == "products" else 1e-5) * expected.norm()
    values = torch.linalg.eigvalsh(expected)
    values = values[values.abs().argsort(descending=True)][:3]
    torch.testing.assert_close(found.values.double(), values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cut", [Rank(4), Energy(0.6)], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), BatchedEmpiricalFisher(2)], ids=str)
def test_the_residual_keeps_the_diagonal_and_the_trace_exact(kind, cut, way, architecture, problem, close, exact, best):
    risk = problem(architecture, "cross_entropy").risk
    whole = exact(kind, risk)
    matrix = estimate(kind, LowRank(cut, residual=Diagonal()), risk).curvature
    close(matrix.dense().diagonal(), whole.diagonal())
    assert matrix.trace() == pytest.approx(float(whole.trace()))
    tolerance = 1e-4 if way == "products" else 1e-9
    expected = best(whole, len(matrix.values))
    close(matrix.dense() - matrix.dense().diagonal().diag(), expected - expected.diagonal().diag(), tolerance)


def random_low_rank(space, seed, rank=3, diagonal=False, max_rank=None):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(space.size, rank, generator=generator, dtype=torch.float64))
    values = torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True).values
    d = torch.rand(space.size, generator=generator, dtype=torch.float64) if diagonal else None
    return LowRankMatrix(q.T.contiguous(), values, d, max_rank)


SPACE = ParameterSpace(("weight", "scale", "bias"), (Size((3, 2)), Size(()), Size((3,))))


@pytest.mark.parametrize("diagonals", [(False, False), (True, True), (True, False), (False, True)])
def test_sums_are_exact(diagonals, close, best):
    a, b = (random_low_rank(SPACE, seed, diagonal=d) for seed, d in enumerate(diagonals))
    close(a.plus(b).dense(), a.dense() + b.dense())
    many = [random_low_rank(SPACE, seed) for seed in range(5)]  # 15 pairs in 10 dimensions
    total = many[0]
    for other in many[1:]:
        total = total.plus(other)
    whole = sum(m.dense() for m in many)
    close(total.dense(), whole)
    assert total.trace() == pytest.approx(float(whole.trace()))
    values, vectors = total.top(3)
    close((vectors.T * values) @ vectors, best(whole, 3))


@pytest.mark.parametrize("max_rank", [3, 4, 5])
def test_a_sum_over_its_largest_rank_is_the_best_approximation_of_that_rank(max_rank, close, best):
    a, b = (random_low_rank(SPACE, seed, max_rank=max_rank) for seed in (0, 1))
    total = a.plus(b).compressed()
    assert len(total.values) == max_rank
    close(total.dense(), best(a.dense() + b.dense(), max_rank))
    assert len(total.plus(a).compressed().values) == max_rank


def test_what_a_sum_cuts_off_stays_in_the_diagonal(close):
    a, b = (random_low_rank(SPACE, seed, diagonal=True, max_rank=3) for seed in (0, 1))
    total = a.plus(b).compressed()
    assert len(total.values) == 3
    close(total.dense().diagonal(), (a.dense() + b.dense()).diagonal())


def test_more_pairs_than_the_matrix_has_are_all_of_it(way, problem, close, exact):
    risk = problem("mlp", "cross_entropy").risk
    for kind in KINDS:
        whole = exact(kind, risk)
        found = estimate(kind, LowRank(Rank(risk.space.size + 10)), risk).curvature
        assert len(found.values) <= risk.space.size
        close(found.dense(), whole, 1e-8)


@pytest.mark.parametrize(
    "structure",
    [LowRank(Rank(2)), LowRank(Energy(0.9)), LowRank(Rank(2), Diagonal()), LowRank(Energy(0.9), Diagonal()),
     FlatSpectrum(LowRank(Rank(2))), FlatSpectrum(LowRank(Energy(0.5))), BlockDiagonal(PerLayer(), LowRank(Rank(2)))],
    ids=str,
)  # fmt: skip
def test_no_curvature_at_all_gives_zero(structure, way, exact_problem, losses, net):
    """The empirical Fisher where every target is met."""
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    risk = exact_problem(net, losses["mean_square"], inputs, net(inputs).detach()).risk
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = estimate(EmpiricalFisher(), structure, risk)
    matrix = model.curvature
    ones = torch.ones(risk.space.size).double()
    assert matrix.product(ones).abs().max() < 1e-12
    assert abs(matrix.trace()) < 1e-12
    assert matrix.dense().shape == (risk.space.size,) * 2
    assert (model + model).curvature.scaled(2.0).product(ones).abs().max() < 1e-12


def test_the_top_of_an_empty_matrix_is_empty():
    empty = LowRankMatrix(torch.zeros(0, 4).double(), torch.zeros(0).double())
    values, vectors = empty.top(2)
    assert values.shape == (0,)
    assert vectors.shape == (0, 4)
    assert empty.map_spectrum(torch.exp).values.shape == (0,)


@pytest.mark.parametrize("psd", [Clip(), Absolute()], ids=str)
def test_a_hessian_is_mended_in_the_directions_that_are_kept(psd, way, problem, close, exact):
    risk = problem("mlp", "cross_entropy").risk
    values, vectors = torch.linalg.eigh(exact(Hessian(), risk))
    top = values.abs().argsort(descending=True)[:12]
    assert (values[top] < 0).any()
    mended = (vectors[:, top] * psd(values[top])) @ vectors[:, top].T
    found = estimate(Hessian(psd=psd), LowRank(Rank(12)), risk).curvature
    close(found.dense(), mended, 1e-4 if way == "products" else 1e-8)


@pytest.mark.parametrize("structure", [LowRank(Energy(0.9)), FlatSpectrum(LowRank(Energy(0.9))),
                                       BlockDiagonal(PerLayer(), LowRank(Energy(0.9)))], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [Hessian(), Hessian(Clip())], ids=str)
def test_a_part_of_the_trace_of_an_indefinite_matrix_is_refused(kind, structure, problem):
    with pytest.raises(TypeError, match=r"Energy.*may be indefinite. Use Rank\(k\)"):
        estimate(kind, structure, problem("mlp", "cross_entropy").risk)
    with pytest.raises(TypeError, match="indefinite"):
        check_pair(kind, structure)


@pytest.mark.parametrize(
    "values",
    [
        torch.cat([torch.tensor([5.0] * 3 + [-5.0] * 2), torch.ones(1200)]),
        torch.linspace(0.1, 0.3, 60).repeat(20),  # as of a linear head with 20 outputs and squared error
        torch.cat([torch.tensor([3.0] * 12), torch.zeros(1200)]),
    ],
    ids=["of_both_signs", "crowded", "and_none_else"],
)
def test_lanczos_finds_repeated_eigenvalues(values):
    values = values.double()
    found, vectors = eigen.top_of_products(lambda v: values * v, torch.zeros_like(values), 12)
    torch.testing.assert_close(found.abs(), values.abs().sort(descending=True)[0][:12], rtol=1e-6, atol=0)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(12).double(), rtol=0, atol=1e-6)


class FoldedTokens(nn.Module):
    """Positions of an example are rows of their own."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 3), nn.Linear(9, 3)

    def forward(self, inputs):
        return self.head(self.mix(inputs.reshape(-1, 4)).tanh().reshape(-1, 9))


def test_rows_that_are_positions_are_not_taken_for_examples(
    monkeypatch, exact_problem, make_model, losses, close, exact
):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(7, 12, generator=generator).double(), torch.randint(3, (7,), generator=generator)
    risk = exact_problem(make_model(FoldedTokens), losses["cross_entropy"], inputs, targets).risk
    values = torch.linalg.eigvalsh(exact(GGN(), risk)).flip(0)[:4]
    monkeypatch.setattr("avalanche_curv.core.structures.low_rank.WHOLE", 0)
    close(estimate(GGN(), LowRank(Rank(4)), risk).curvature.values, values)
    with torch.no_grad():
        theta = risk.anchor + 0.1
    general = OutputModels(GGN(), risk).compare(theta)
    close(example_models(GGN(), risk).compare(theta).quadratic.gamma, general.quadratic.gamma)
