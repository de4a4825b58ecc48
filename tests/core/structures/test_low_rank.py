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
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    Fisher,
    FlatSpectrum,
    Hessian,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    PerLayer,
    PerParameter,
    Rank,
    estimate,
)
from avalanche_curv.core import eigen
from avalanche_curv.core.curvature.operators import GramOperator
from avalanche_curv.core.fidelity.examples import OutputModels
from avalanche_curv.core.fidelity.monitor import example_models
from avalanche_curv.core.structures import LowRankMatrix
from avalanche_curv.core.structures import low_rank as rules
from avalanche_curv.core.structures.rules import check_pair

KINDS = [GGN(), Fisher(), Fisher(samples=2, seed=1), EmpiricalFisher(), BatchedEmpiricalFisher(2), Hessian()]
WAYS = ["whole", "rows", "products"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Which of the three ways is taken."""
    if request.param != "whole":
        monkeypatch.setattr(rules, "WHOLE", 0)
        monkeypatch.setattr(rules, "_of_whole", None)
    if request.param == "products":
        monkeypatch.setattr(rules, "GRAM_ROWS", 0)
        monkeypatch.setattr(rules, "top_pairs", None)
        monkeypatch.setattr(eigen, "WHOLE", 0)
    return request.param


def exact(kind, risk):
    return estimate(kind, Dense(), risk).curvature.dense()


def best(matrix, rank):
    """The nearest matrix of a rank: the eigenvalues of largest magnitude (Eckart & Young 1936)."""
    values, vectors = torch.linalg.eigh(matrix.double())
    top = values.abs().argsort(descending=True)[:rank]
    return (vectors[:, top] * values[top]) @ vectors[:, top].T


@pytest.mark.parametrize(("architecture", "loss"), [("mlp", "cross_entropy"), ("conv", "mean_square")])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_way_gives_the_top_eigenpairs_of_the_whole_matrix(kind, loss, way, architecture, problem, close):
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


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_single_precision_agrees_to_five_digits(kind, way, make_model):
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


@pytest.mark.parametrize("fraction", [0.3, 0.9, 1.0])
def test_energy_keeps_the_fewest_pairs_that_hold_the_fraction(fraction, way, problem):
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


@pytest.mark.parametrize("cut", [Rank(4), Energy(0.6)], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), BatchedEmpiricalFisher(2)], ids=str)
def test_the_residual_keeps_the_diagonal_and_the_trace_exact(kind, cut, way, architecture, problem, close):
    risk = problem(architecture, "cross_entropy").risk
    whole = exact(kind, risk)
    matrix = estimate(kind, LowRank(cut, residual=Diagonal()), risk).curvature
    close(matrix.dense().diagonal(), whole.diagonal())
    assert matrix.trace() == pytest.approx(float(whole.trace()))
    tolerance = 1e-4 if way == "products" else 1e-9
    expected = best(whole, len(matrix.values))
    close(matrix.dense() - matrix.dense().diagonal().diag(), expected - expected.diagonal().diag(), tolerance)


@pytest.mark.parametrize("residual", [None, Diagonal()])
def test_products_traces_and_tops_are_those_of_the_entries(residual, problem, close):
    matrix = estimate(GGN(), LowRank(Rank(3), residual), problem("mlp", "cross_entropy").risk).curvature
    whole = matrix.dense()
    v = torch.linspace(-1, 1, matrix.size).double()
    close(matrix.product(v), whole @ v)
    close(matrix.scaled(-2.5).dense(), -2.5 * whole)
    assert matrix.trace() == pytest.approx(float(whole.trace()))
    values, vectors = matrix.top(2)
    close((vectors.T * values) @ vectors, best(whole, 2), 1e-8)


def random_low_rank(space, seed, rank=3, diagonal=False, max_rank=None):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(space.size, rank, generator=generator, dtype=torch.float64))
    values = torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True).values
    d = torch.rand(space.size, generator=generator, dtype=torch.float64) if diagonal else None
    return LowRankMatrix(q.T.contiguous(), values, d, max_rank)


SPACE = ParameterSpace(("weight", "scale", "bias"), (Size((3, 2)), Size(()), Size((3,))))
GROWN = ParameterSpace(("new", "bias", "scale", "weight"), (Size((2,)), Size((5,)), Size(()), Size((5, 2))))


@pytest.mark.parametrize("diagonals", [(False, False), (True, True), (True, False), (False, True)])
def test_sums_are_exact(diagonals, close):
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
def test_a_sum_over_its_largest_rank_is_the_best_approximation_of_that_rank(max_rank, close):
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


@pytest.mark.parametrize("diagonal", [False, True])
def test_an_embedded_matrix_is_zero_where_the_inner_space_has_nothing(diagonal, close):
    # new 0-1 | bias 2-6 | scale 7 | weight 8-17, of which rows 0-2 are 8-13
    where = torch.tensor([8, 9, 10, 11, 12, 13, 7, 2, 3, 4])
    matrix = random_low_rank(SPACE, 0, diagonal=diagonal)
    expected = torch.zeros(18, 18).double()
    expected[where[:, None], where] = matrix.dense()
    close(matrix.embedded(SPACE, GROWN).dense(), expected)


@pytest.mark.parametrize("cut", [Rank(3), Energy(0.8)], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher()], ids=str)
def test_a_flat_spectrum_is_as_stiff_everywhere_as_in_its_sharpest_direction(kind, cut, way, problem, close):
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


@pytest.mark.parametrize("block", [LowRank(Rank(2)), LowRank(Rank(2), Diagonal()), LowRank(Energy(0.7))], ids=str)
@pytest.mark.parametrize("per", [PerParameter(), PerLayer()], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), BatchedEmpiricalFisher(2), Hessian()], ids=str)
def test_blocks_of_low_rank_are_those_of_the_blocks_of_the_matrix(kind, per, block, architecture, problem, close):
    if isinstance(kind, Hessian) and isinstance(block.cut, Energy):
        pytest.skip("refused")
    risk = problem(architecture, "cross_entropy").risk
    whole = exact(kind, risk)
    found = estimate(kind, BlockDiagonal(per, block), risk).curvature
    start, entries = 0, found.dense()
    for part in found.blocks:
        stop = start + part.space.size
        own = whole[start:stop, start:stop]
        rank = len(part.matrix.values)
        if isinstance(block.cut, Energy):
            values = torch.linalg.eigvalsh(own).flip(0)
            assert rank == int((values.cumsum(0) < 0.7 * values.sum() * (1 - 1e-6)).sum()) + 1
        else:
            assert rank <= 2
        expected = best(own, 2 if isinstance(block.cut, Rank) else rank)
        if block.residual is not None:
            expected = expected + (own - expected).diagonal().diag()
        close(entries[start:stop, start:stop], expected, 1e-8)
        entries[start:stop, start:stop] = 0
        start = stop
    assert not entries.any()
    names = [part.space.names for part in found.blocks]
    if architecture == "mlp" and per == PerLayer():
        assert names == [("0.weight", "0.bias"), ("2.weight", "2.bias")]


@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), BatchedEmpiricalFisher(2), Hessian()], ids=str)
@pytest.mark.parametrize("per", [PerParameter(), PerLayer()], ids=str)
@pytest.mark.parametrize("block", [Dense(), Diagonal()], ids=str)
def test_blocks_of_other_structures_are_those_of_the_matrix(kind, per, block, problem, close):
    risk = problem("conv", "mean_square").risk
    whole = exact(kind, risk)
    spaces = per.spaces(risk.space)
    mask = torch.block_diag(*[
        torch.eye(s.size) if isinstance(block, Diagonal) else torch.ones(s.size, s.size) for s in spaces
    ]).bool()  # fmt: skip
    found = estimate(kind, BlockDiagonal(per, block), risk).curvature
    close(found.dense(), torch.where(mask, whole, 0.0))
    values, vectors = found.top(3)
    close((vectors.T * values) @ vectors, best(found.dense(), 3), 1e-8)
    assert found.trace() == pytest.approx(float(whole.trace()))


@pytest.mark.parametrize("block", [Dense(), LowRank(Rank(2)), LowRank(Rank(2), Diagonal()), Diagonal()], ids=str)
@pytest.mark.parametrize("first", ["before", "after"])
def test_blocks_of_layers_add_up_when_a_bias_was_frozen_on_the_way(block, first, new_problem, net):
    """The layers of the two spaces do not hold the same parameters."""
    structure = BlockDiagonal(PerLayer(), block)
    free = estimate(GGN(), structure, new_problem(net, "cross_entropy").risk)
    net[0].bias.requires_grad_(False)
    held = estimate(GGN(), structure, new_problem(net, "cross_entropy", seed=1).risk)
    net[0].bias.requires_grad_(True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1
    one, other = (free, held) if first == "before" else (held, free)
    assert float((one + other)(net)) == pytest.approx(float(one(net) + other(net)))


def test_more_pairs_than_the_matrix_has_are_all_of_it(way, problem, close):
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
def test_a_hessian_is_mended_in_the_directions_that_are_kept(psd, way, problem, close):
    risk = problem("mlp", "cross_entropy").risk
    values, vectors = torch.linalg.eigh(exact(Hessian(), risk))
    top = values.abs().argsort(descending=True)[:12]
    assert (values[top] < 0).any()
    mended = (vectors[:, top] * psd(values[top])) @ vectors[:, top].T
    found = estimate(Hessian(psd=psd), LowRank(Rank(12)), risk).curvature
    close(found.dense(), mended, 1e-4 if way == "products" else 1e-8)


def test_a_flat_spectrum_of_absolute_values_keeps_the_negative_directions_too(problem, close):
    risk = problem("mlp", "cross_entropy").risk
    values, vectors = torch.linalg.eigh(exact(Hessian(), risk))
    top = values.abs().argsort(descending=True)[:12]
    expected = values[top[0]].abs() * vectors[:, top] @ vectors[:, top].T
    close(estimate(Hessian(psd=Absolute()), FlatSpectrum(LowRank(Rank(12))), risk).curvature.dense(), expected, 1e-8)


@pytest.mark.parametrize("structure", [LowRank(Energy(0.9)), FlatSpectrum(LowRank(Energy(0.9))),
                                       BlockDiagonal(PerLayer(), LowRank(Energy(0.9)))], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [Hessian(), Hessian(Clip())], ids=str)
def test_a_part_of_the_trace_of_an_indefinite_matrix_is_refused(kind, structure, problem):
    with pytest.raises(TypeError, match=r"Energy.*may be indefinite. Use Rank\(k\)"):
        estimate(kind, structure, problem("mlp", "cross_entropy").risk)
    with pytest.raises(TypeError, match="indefinite"):
        check_pair(kind, structure)


@pytest.mark.parametrize("block", [Kronecker(), MatrixFree(), BlockDiagonal()], ids=str)
def test_blocks_that_cannot_be_read_from_products_are_refused(block):
    with pytest.raises(TypeError, match="BlockDiagonal takes blocks of Dense, Diagonal, LowRank or FlatSpectrum; got"):
        check_pair(GGN(), BlockDiagonal(PerLayer(), block))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rank(0), ValueError, r"Rank\(k\) needs an integer k of at least 1; got 0"),
        (lambda: Rank(2.0), ValueError, "at least 1"),
        (lambda: Rank(True), ValueError, "at least 1"),
        (lambda: Energy(0), ValueError, r"\(0, 1\]; got 0"),
        (lambda: Energy(1.1), ValueError, r"\(0, 1\]"),
        (lambda: Energy(float("nan")), ValueError, r"\(0, 1\]"),
        (lambda: Energy(0.5, most_pairs=0), ValueError, "most_pairs"),
        (lambda: LowRank(5), TypeError, r"LowRank takes Rank\(k\) or Energy\(fraction\); got 5"),
        (lambda: LowRank(Rank(5), residual=Dense()), TypeError, r"takes Diagonal\(\) or None"),
        (lambda: LowRank(Rank(5), residual=True), TypeError, r"takes Diagonal\(\) or None"),
        (lambda: LowRank(Rank(5), max_rank=4), ValueError, "at least the 5 eigenpairs"),
        (lambda: LowRank(Energy(0.5, most_pairs=7), max_rank=6), ValueError, "at least the 7 eigenpairs"),
        (lambda: FlatSpectrum(Rank(5)), TypeError, r"takes a LowRank\(...\)"),
        (lambda: FlatSpectrum(LowRank(Rank(5), Diagonal())), ValueError, "without a residual"),
    ],
)
def test_unusable_options_are_refused_when_they_are_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("structure", [LowRank(Rank(3)), LowRank(Rank(3), Diagonal()), FlatSpectrum(LowRank(Rank(3))),
                                       BlockDiagonal(PerLayer(), LowRank(Rank(2), Diagonal()))], ids=str)  # fmt: skip
def test_memory_is_that_of_the_stored_numbers_and_known_before(structure, problem):
    risk = problem("mlp", "cross_entropy").risk
    assert estimate(GGN(), structure, risk).curvature.nbytes == structure.bytes(risk.space, 8)


def test_too_many_pairs_are_refused_with_a_remedy(problem):
    risk = problem("mlp", "cross_entropy").risk
    needed = 3 * (43 + 1) * 8
    estimate(GGN(), LowRank(Rank(3), max_bytes=needed), risk)
    for wrap in (lambda s: s, FlatSpectrum):
        with pytest.raises(MemoryError, match=r"on 43 parameters needs 1.0 KiB.*Keep fewer eigenpairs, use Diagonal"):
            estimate(GGN(), wrap(LowRank(Rank(3), max_bytes=needed - 1)), risk)


def test_lanczos_finds_repeated_eigenvalues():
    values = torch.tensor([5.0] * 3 + [-5.0] * 2 + [1.0] * 1200).double()
    found, vectors = eigen.top_of_products(lambda v: values * v, torch.zeros(1205).double(), 6)
    torch.testing.assert_close(found.abs(), torch.tensor([5.0] * 5 + [1.0]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6).double(), rtol=0, atol=1e-6)


class FoldedTokens(nn.Module):
    """Positions of an example are rows of their own."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 3), nn.Linear(9, 3)

    def forward(self, inputs):
        return self.head(self.mix(inputs.reshape(-1, 4)).tanh().reshape(-1, 9))


def test_rows_that_are_positions_are_not_taken_for_examples(monkeypatch, exact_problem, make_model, losses, close):
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
