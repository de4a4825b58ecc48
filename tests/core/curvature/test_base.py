"""What a kind of curvature says of itself: its sign, its rows, its spectrum, its examples, its shards."""

import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    Absolute,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    Curvature,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    Fisher,
    FromLinearOperator,
    Hessian,
    LowRank,
    OutputGradient,
    PerLayer,
    Rank,
    estimate,
)
from avalanche_curv.core import eigen
from avalanche_curv.core.curvature.operators import GramOperator
from avalanche_curv.core.structures import low_rank
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.rules import check_pair


class Silent(Curvature):
    """A kind that says nothing of itself."""

    def operator(self, risk):
        return GramOperator(risk.gradient()[None])


class Signed(Silent):
    is_semidefinite = True


WITHOUT_ROWS = [Hessian(), Silent(), FromLinearOperator(len)]
ROWS = {
    GGN(): lambda paper: paper.ggns.mean(0),
    Fisher(): lambda paper: paper.ggns.mean(0),
    EmpiricalFisher(): lambda paper: paper.empirical_fishers.mean(0),
    BatchedEmpiricalFisher(2): lambda paper: paper.batch_gradients(2).T @ paper.batch_gradients(2) / 4,
    OutputGradient(): lambda paper: observed(paper).T @ observed(paper) / 7,
}


def observed(paper):
    """∇f_i of the observed class."""
    return paper.jacobians[torch.arange(7), paper.targets]


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        *((kind, True) for kind in (*ROWS, Fisher(samples=1, seed=0), Signed(), FromLinearOperator(len, True))),
        *((kind, False) for kind in (*WITHOUT_ROWS, Hessian(Clip()))),
    ],
)
def test_a_part_of_the_trace_is_taken_of_kinds_that_say_they_are_semidefinite(kind, known):
    assert kind.is_semidefinite is known
    check_pair(kind, LowRank(Rank(2)))
    if known:
        check_pair(kind, LowRank(Energy(0.9)))
    else:
        with pytest.raises(TypeError, match=r"Use Rank\(k\), or say is_semidefinite = True of a kind of your own"):
            check_pair(kind, LowRank(Energy(0.9)))


@pytest.mark.parametrize("kind", ROWS, ids=str)
def test_rows_are_a_root_of_the_curvature(kind, architecture, problem, close):
    known = problem(architecture, "cross_entropy")
    rows = torch.cat(list(kind.rows(known.risk)))
    assert len(rows) == kind.row_count(known.risk)
    close(rows.T @ rows, ROWS[kind](known.paper))


@pytest.mark.parametrize("kind", WITHOUT_ROWS, ids=lambda kind: type(kind).__name__)
def test_other_kinds_have_no_rows(kind, problem):
    risk = problem("mlp", "cross_entropy").risk
    assert kind.row_count(risk) is None
    with pytest.raises(TypeError, match=r"not known as a sum of outer products. Use Fisher\(\), GGN\(\) or"):
        kind.rows(risk)


@pytest.mark.parametrize(("psd", "expected"), [(None, [1.0, -2.0]), (Clip(), [1.0, 0.0]), (Absolute(), [1.0, 2.0])])
def test_a_hessian_is_mended_as_its_psd_says(psd, expected):
    kind, matrix = Hessian(psd), DiagonalMatrix(torch.tensor([1.0, -2.0]))
    assert kind.mended(matrix).values.tolist() == expected
    assert kind.is_mended is (psd is not None)
    assert kind.unmended() == Hessian()
    infinite = DiagonalMatrix(torch.tensor([1.0, float("nan")]))
    assert kind.mended(infinite) is infinite


@pytest.mark.parametrize("kind", [*ROWS, Silent()], ids=lambda kind: type(kind).__name__)
def test_the_spectrum_of_other_kinds_stays_as_it_is(kind):
    matrix = DiagonalMatrix(torch.tensor([1.0, -2.0]))
    assert kind.mended(matrix) is matrix
    assert kind.unmended() is kind
    assert not kind.is_mended


def test_the_hessian_expands_the_loss_of_each_example(known, close):
    delta = torch.linspace(-1, 1, known.risk.space.size).double()
    slopes, products = Hessian().example_expansion(known.risk, known.paper.inputs, known.paper.targets, delta)
    close(slopes, known.paper.gradients)
    close(products, known.paper.hessians @ delta)


@pytest.mark.parametrize("kind", [Hessian(Clip()), BatchedEmpiricalFisher(2), Silent()], ids=lambda k: type(k).__name__)
def test_other_kinds_define_no_curvature_of_one_example(kind, problem):
    known = problem("mlp", "cross_entropy")
    assert not kind.is_known_of_examples
    with pytest.raises(TypeError, match=r"does not define. Use GGN\(\).*Hessian\(\) without psd"):
        kind.example_expansion(known.risk, known.paper.inputs, known.paper.targets, known.risk.anchor)


@pytest.mark.parametrize("kind", [GGN(), Hessian(), BatchedEmpiricalFisher(2), BatchedEmpiricalFisher(4)], ids=str)
def test_the_terms_of_shards_weigh_their_curvatures(kind, problem, close):
    risk = problem("mlp", "cross_entropy").risk
    parts = [risk.select(torch.arange(4)), risk.select(torch.arange(4, 7))]
    kind.check_shards([part.examples for part in parts])
    identity = torch.eye(risk.space.size).double()
    whole, *some = (kind.terms(part.examples) * kind.operator(part).matmat(identity) for part in (risk, *parts))
    close(sum(some), whole)


@pytest.mark.parametrize(
    ("counts", "fits"), [([3, 6, 1], True), ([3, 4, 0], True), ([4, 3], False), ([0, 1, 3], False)]
)
def test_no_mini_batch_lies_on_two_shards(counts, fits):
    GGN().check_shards(counts)
    if fits:
        BatchedEmpiricalFisher(3).check_shards(counts)
    else:
        with pytest.raises(ValueError, match="a multiple of 3 examples on every rank but the last"):
            BatchedEmpiricalFisher(3).check_shards(counts)


def test_a_kind_that_says_so_is_cut_at_a_part_of_its_trace(problem):
    """∇L ∇Lᵀ has one direction."""
    matrix = estimate(Signed(), LowRank(Energy(0.9)), problem("mlp", "cross_entropy").risk).curvature
    assert len(matrix.values) == 1


class Attentive(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(1, (3, 4))
        x = x if self.batch_first else x.transpose(0, 1)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(mixed.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("structure", [LowRank(Rank(3)), BlockDiagonal(PerLayer(), Diagonal())], ids=str)
def test_products_that_lack_forward_derivatives_go_in_reverse(structure, batch_first, monkeypatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 12).double(), torch.randint(3, (9,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    risk = EmpiricalRisk.snapshot(Attentive(batch_first).double(), nn.CrossEntropyLoss(), batches)
    exact = estimate(Fisher(), Dense(), risk).curvature.dense()
    monkeypatch.setattr(low_rank, "WHOLE", 0)
    monkeypatch.setattr(low_rank, "GRAM_ROWS", 0)
    monkeypatch.setattr(eigen, "WHOLE", 0)
    matrix = estimate(Fisher(), structure, risk).curvature
    if isinstance(structure, LowRank):
        values = torch.linalg.eigvalsh(exact).flip(0)[:3]
        torch.testing.assert_close(matrix.values, values, rtol=1e-6, atol=1e-12)
    else:
        torch.testing.assert_close(matrix.dense().diagonal(), exact.diagonal(), rtol=1e-8, atol=1e-12)
