"""Laws of every matrix against its entries written out, and what structures say of themselves."""

from dataclasses import replace

import pytest
import torch
from torch import Size

from avalanche_curv import (
    EKFAC,
    GGN,
    BlockDiagonal,
    Dense,
    Diagonal,
    Energy,
    FlatSpectrum,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    PerLayer,
    PerParameter,
    PiWeighted,
    Rank,
    estimate,
)
from avalanche_curv.core.curvature.operators import GramOperator
from avalanche_curv.core.structures.base import DampedMatrix, all_finite
from avalanche_curv.core.structures.block_diagonal import Block, BlockDiagonalMatrix
from avalanche_curv.core.structures.dense import DenseMatrix
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.kronecker_cut import leading_part
from avalanche_curv.core.structures.kronecker_matrix import FactoredLayer, KroneckerMatrix
from avalanche_curv.core.structures.kronecker_terms import Corrected, Factors
from avalanche_curv.core.structures.low_rank import LowRankMatrix
from avalanche_curv.core.structures.matrix_free import MatrixFreeMatrix, OperatorTerm
from avalanche_curv.core.structures.memory import human_bytes
from avalanche_curv.core.structures.rules import check_pair

SPACE = ParameterSpace(("weight", "scale", "bias"), (Size((3, 2)), Size(()), Size((3,))))
GROWN = ParameterSpace(("new", "bias", "scale", "weight"), (Size((2,)), Size((5,)), Size(()), Size((5, 2))))
LARGER = ParameterSpace(("new", "bias", "weight", "scale", "last"),
                        (Size((2,)), Size((6,)), Size((6, 3)), Size(()), Size((2,))))  # fmt: skip
# GROWN: new 0-1 | bias 2-6 | scale 7 | weight 8-17, of which rows 0-2 are 8-13
IN_GROWN = torch.tensor([8, 9, 10, 11, 12, 13, 7, 2, 3, 4])
# LARGER: new 0-1 | bias 2-7 | weight 8-25, rows of 3 | scale 26 | last 27-28
IN_LARGER = torch.tensor([8, 9, 11, 12, 14, 15, 26, 2, 3, 4])
LAYER = torch.tensor([0, 1, 7, 2, 3, 8, 4, 5, 9])  # weight and bias as one matrix, row by row
TAU = 0.7


def symmetric(size, seed):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return root + root.T


def placed(entries, where, size):
    result = torch.zeros(size, size).double()
    result[where[:, None], where] = entries
    return result


def blocks(entries):
    parts = zip(PerParameter().spaces(SPACE), (slice(0, 6), slice(6, 7), slice(7, 10)))
    found = tuple(Block(part, DenseMatrix(entries[at, at].clone())) for part, at in parts)
    return BlockDiagonalMatrix(SPACE, PerParameter(), found)


def low_rank(entries, diagonal):
    values, vectors = torch.linalg.eigh(entries)
    top = values.abs().argsort(descending=True)[:3]
    beside = entries.diagonal().abs() if diagonal else None
    whole = (vectors[:, top] * values[top]) @ vectors[:, top].T
    matrix = LowRankMatrix(vectors[:, top].T.contiguous(), values[top], beside)
    return matrix, whole + beside.diag() if diagonal else whole


def kronecker(entries, corrected, cut=None):
    a, g = entries[:3, :3] @ entries[:3, :3], entries[3:6, 3:6] @ entries[3:6, 3:6]
    diagonal = torch.zeros(10).double()
    diagonal[6] = 1.5
    term, whole = Factors(a, g), torch.kron(g, a)
    if corrected:
        q_a, q_g = torch.linalg.qr(a).Q, torch.linalg.qr(g).Q
        term = Corrected(entries[6:9, 6:9], q_g, q_a)
        q = torch.kron(q_g, q_a)
        whole = q @ entries[6:9, 6:9].reshape(-1).diag() @ q.T
    if cut is not None:
        term = leading_part(term, cut)
        whole = term.dense()
    matrix = KroneckerMatrix(SPACE, (FactoredLayer("weight", "bias", (term,)),), diagonal)
    return matrix, placed(whole, LAYER, 10) + diagonal.diag()


def matrix_free(entries):
    matrix = MatrixFreeMatrix(10, entries.new_empty(0), (OperatorTerm(GramOperator(entries[:4])),))
    return matrix, entries[:4].T @ entries[:4]


MATRICES = {
    "dense": lambda e: (DenseMatrix(e.clone()), e),
    "diagonal": lambda e: (DiagonalMatrix(e.diagonal().clone()), e.diagonal().diag()),
    "blocks": lambda e: (blocks(e), torch.block_diag(e[:6, :6], e[6:7, 6:7], e[7:, 7:])),
    "low rank": lambda e: low_rank(e, diagonal=False),
    "low rank and diagonal": lambda e: low_rank(e, diagonal=True),
    "kronecker": lambda e: kronecker(e, corrected=False),
    "corrected kronecker": lambda e: kronecker(e, corrected=True),
    "cut kronecker": lambda e: kronecker(e, corrected=False, cut=Rank(1)),
    "matrix free": matrix_free,
}
EVERY = [*MATRICES, *(f"damped {name}" for name in MATRICES)]


def made(name, seed=0):
    """A matrix and its entries."""
    matrix, entries = MATRICES[name.removeprefix("damped ")](symmetric(10, seed))
    damped = matrix.damped(TAU), entries + TAU * torch.eye(10).double()
    return damped if name.startswith("damped") else (matrix, entries)


@pytest.fixture(params=EVERY)
def name(request):
    return request.param


def test_entries_products_forms_and_traces(name, close):
    matrix, entries = made(name)
    v = torch.arange(1.0, 11).double()
    assert matrix.size == 10
    close(matrix.dense(), entries)
    close(matrix.product(v), entries @ v)
    close(matrix.quadratic_form(v), v @ entries @ v)
    assert matrix.trace() == pytest.approx(float(entries.trace()))


def test_products_come_in_the_shapes_of_the_parameters(name, close):
    matrix, entries = made(name)
    v = torch.arange(1.0, 11).double()
    parts = matrix.products(v, SPACE)
    assert [part.shape for part in parts] == list(SPACE.shapes)
    close(SPACE.flatten(parts), entries @ v)


def test_the_top_of_the_spectrum(name, close):
    matrix, entries = made(name)
    values, vectors = matrix.top(3)
    exact = torch.linalg.eigvalsh(entries)
    close(values, exact[exact.abs().argsort(descending=True)][:3], 1e-8)
    close(vectors @ vectors.T, torch.eye(3).double(), 1e-8)
    close(entries @ vectors.T, vectors.T * values, 1e-8)
    assert matrix.largest() == pytest.approx(float(exact.max()), rel=1e-2)
    assert matrix.scaled(-1.0).largest() == pytest.approx(-float(exact.min()), rel=1e-2, abs=1e-6)


def test_sums_and_multiples_are_those_of_the_entries(name, close):
    (one, a), (two, b) = made(name, 0), made(name, 1)
    close(one.plus(two).scaled(-2.5).dense(), -2.5 * (a + b))
    close(one.plus(two).compressed().dense(), a + b)
    assert one.plus(two).trace() == pytest.approx(float((a + b).trace()))


def test_growth_places_the_entries_and_leaves_zero_elsewhere(name, close):
    (one, a), (two, b) = made(name, 0), made(name, 1)
    grown = one.embedded(SPACE, GROWN)
    close(grown.dense(), placed(a, IN_GROWN, 18))
    close(grown.top(2)[0].abs(), torch.linalg.eigvalsh(a).abs().sort(descending=True).values[:2], 1e-8)
    larger = grown.plus(two.embedded(SPACE, GROWN)).embedded(GROWN, LARGER)
    v = torch.linspace(-1, 1, 29).double()
    close(larger.product(v), placed(a + b, IN_LARGER, 29) @ v)


def test_operations_leave_the_matrix_as_it_was(name):
    matrix, _ = made(name)
    before = [t.clone() for t in matrix.tensors()]
    matrix.plus(matrix).compressed(), matrix.scaled(2.0), matrix.embedded(SPACE, GROWN), matrix.damped(1.0)
    matrix.product(torch.ones(10).double()), matrix.top(2)
    assert all(torch.equal(a, b) for a, b in zip(before, matrix.tensors(), strict=True))


def test_a_function_of_the_spectrum_acts_on_the_eigenvalues_where_they_are_at_hand(name, close):
    matrix, entries = made(name)
    if isinstance(matrix, DampedMatrix | MatrixFreeMatrix):
        with pytest.raises(TypeError, match=r"not at hand|map that of the matrix, and then damp it"):
            matrix.map_spectrum(torch.square)
    elif matrix.tensors()[-1].shape == (10,) and isinstance(matrix, LowRankMatrix):  # each part by itself
        part, beside = entries - matrix.diagonal.diag(), matrix.diagonal
        close(matrix.map_spectrum(torch.square).dense(), part @ part + beside.square().diag(), 1e-8)
    else:
        close(matrix.map_spectrum(torch.square).dense(), entries @ entries, 1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plain", [name for name in MATRICES if name != "matrix free"])
def test_one_number_makes_a_matrix_not_finite(value, plain):
    for matrix in (made(plain)[0], made(f"damped {plain}")[0]):
        assert matrix.is_finite()
        last = matrix.tensors()[-1]
        last[(-1,) * last.ndim] = value
        assert not matrix.is_finite()


def test_blocks_put_together_are_the_matrix(name, close):
    matrix, entries = made(name)
    whole = torch.zeros(10, 10).double()
    for space, block in matrix.in_blocks(SPACE):
        at = SPACE.positions(space)
        whole[at[:, None], at] = block.dense()
    close(whole, entries)
    assert len(matrix.in_blocks(SPACE)) == (3 if name == "blocks" else 1)
    if name == "blocks":
        assert matrix.embedded(SPACE, GROWN).in_blocks(GROWN)[0] == (PerParameter().spaces(GROWN)[0], None)


def test_eigenvectors_beside_a_diagonal_are_the_matrix_and_its_sums(name, close):
    (one, a), (two, b) = made(name, 0), made(name, 1)
    assert (one.eigenvectors_beside_diagonal() is not None) is isinstance(one, DiagonalMatrix | LowRankMatrix)
    for matrix, entries in ((one, a), (one.plus(two), a + b)):
        parts = matrix.eigenvectors_beside_diagonal()
        if parts is not None:
            (values, vectors), diagonal = parts
            close((vectors.T * values) @ vectors + (0 if diagonal is None else diagonal.diag()), entries)
    assert one.sums_are_cut is False
    assert LowRankMatrix(torch.eye(2), torch.ones(2), max_rank=2).sums_are_cut


def test_the_pseudo_inverse_is_that_of_the_entries(name):
    """Of positive semi-definite entries, all positive, which are eigenvalues of the corrected Kronecker product."""
    root = torch.rand(10, 10, generator=torch.Generator().manual_seed(0)).double()
    matrix, entries = MATRICES[name.removeprefix("damped ")](root @ root.T)
    if name.startswith("damped"):
        matrix, entries = matrix.damped(TAU), entries + TAU * torch.eye(10).double()
    found = matrix.pseudo_inverse(1e-12)
    assert (found is None) is name.endswith(("low rank and diagonal", "matrix free"))
    if found is not None:
        torch.testing.assert_close(found.dense(), torch.linalg.pinv(entries, hermitian=True, rtol=1e-12))
        torch.testing.assert_close(found.product(entries[0]), found.dense() @ entries[0])


def test_no_pseudo_inverse_is_made_of_eigenvalues_that_are_not_those_of_the_matrix():
    a, b = made("kronecker")[0], made("corrected kronecker")[0]
    over = replace(a, diagonal=torch.ones(10).double())  # beside the diagonal of the layer
    again = replace(a.layers[0], bias=None, terms=(Factors(torch.eye(2).double(), torch.eye(3).double()),))
    shared = replace(a, layers=(*a.layers, again))
    assert [m.pseudo_inverse(1e-12) for m in (a.plus(b), over, shared, a.plus(b).damped(TAU))] == [None] * 4
    uneven = DampedMatrix(made("dense")[0], torch.arange(10.0).double())
    assert uneven.pseudo_inverse(1e-12) is None


def test_a_negative_eigenvalue_is_refused_unless_it_is_rounding_or_damped():
    matrix = DenseMatrix(torch.diag(torch.tensor([1.0, 0.5, -1e-3])).double())
    with pytest.raises(ValueError, match=r"negative curvature -0\.001.*no minimum.*damping above 0\.001"):
        matrix.pseudo_inverse(1e-6)
    with pytest.raises(ValueError, match="negative curvature"):
        DampedMatrix(matrix, torch.full((3,), 1e-4).double()).pseudo_inverse(1e-6)
    assert matrix.pseudo_inverse(1e-2).dense().diagonal().tolist() == pytest.approx([1, 2, 0])
    assert matrix.damped(1.0).pseudo_inverse(0).dense().diagonal().tolist() == pytest.approx([0.5, 1 / 1.5, 1 / 0.999])


@pytest.mark.parametrize("plain", [name for name in MATRICES if name != "dense"])
def test_structures_do_not_mix_silently(plain):
    other = "dense" if plain == "diagonal" else "diagonal"
    with pytest.raises(TypeError, match=f"added.*; got {type(made(other)[0]).__name__}"):
        made(plain)[0].plus(made(other)[0])


def test_a_damped_matrix_counts_its_diagonal_and_adds_one_that_is_not(close):
    matrix, entries = made("low rank")
    assert matrix.damped(TAU).nbytes == matrix.nbytes + 8 * 10
    close(matrix.damped(TAU).plus(matrix).dense(), 2 * entries + TAU * torch.eye(10).double())


STRUCTURES = {
    Dense(): (True, True),
    Diagonal(): (True, True),
    LowRank(Rank(3)): (False, True),
    LowRank(Rank(3), Diagonal()): (False, True),
    FlatSpectrum(LowRank(Rank(3))): (False, True),
    BlockDiagonal(): (True, False),
    BlockDiagonal(PerLayer(), Diagonal()): (True, False),
    BlockDiagonal(PerLayer(), LowRank(Rank(2), Diagonal())): (False, False),
    Kronecker(): (True, False),
    EKFAC(): (False, False),
    MatrixFree(): (False, False),
}


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_numbers_average_over_parts_of_the_data_where_a_structure_says_so(structure, problem):
    assert structure.is_mean is STRUCTURES[structure][0]
    risk = problem("mlp", "cross_entropy").risk
    parts = risk, risk.select(torch.arange(4)), risk.select(torch.arange(4, 7))
    held = zip(*(estimate(GGN(), structure, part).curvature.tensors() for part in parts))
    averages = all(torch.allclose(7 * whole, 4 * a + 3 * b) for whole, a, b in held)
    assert averages is structure.is_mean or isinstance(structure, MatrixFree)  # which holds no numbers


PASTS = {
    **dict.fromkeys(STRUCTURES), Kronecker(KeepTerms()): "sums=KeepTerms()", EKFAC(cut=Rank(1)): "cut=Rank(k=1)",
    LowRank(Rank(3), max_rank=4): "max_rank=4", LowRank(Rank(3), Diagonal()): "residual=Diagonal()",
    BlockDiagonal(PerLayer()): "per=PerLayer()",
}  # fmt: skip
ALIKE = {EKFAC(): Kronecker(), FlatSpectrum(LowRank(Rank(3))): LowRank(Rank(3))}  # whose sums are taken alike


@pytest.mark.parametrize("structure", PASTS, ids=str)
def test_a_structure_goes_on_with_its_own_sums_alone(structure, problem):
    risk = problem("mlp", "cross_entropy").risk
    own = estimate(GGN(), structure, risk)
    for past in (own, own + own, own.damped(0.5), own.embedded(own.space.union(GROWN))):
        structure.check_past(past.curvature)
    for other in PASTS:
        if ALIKE.get(structure, structure) == ALIKE.get(other, other):
            other.check_past(own.curvature)
            continue
        kinds = [type(one).__name__ for one in (own.curvature, other)]
        with pytest.raises(TypeError, match=r"The past of {}.* cannot go on with structure={}".format(*kinds)):
            other.check_past(own.curvature)


@pytest.mark.parametrize(("made", "others"), [(made, others) for made, others in PASTS.items() if others])
def test_what_the_sums_of_a_past_differ_in_is_named(made, others, problem):
    own = estimate(GGN(), made, problem("mlp", "cross_entropy").risk).curvature
    plain = {Kronecker: Kronecker(), EKFAC: EKFAC(), LowRank: LowRank(Rank(3)), BlockDiagonal: BlockDiagonal()}
    assert plain[type(made)].differs_from(own) == f"{type(own).__name__} with {others}"


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_blocks_take_the_structures_that_say_they_fit(structure):
    assert structure.fits_in_blocks is STRUCTURES[structure][1]
    if structure.fits_in_blocks:
        check_pair(GGN(), BlockDiagonal(PerLayer(), structure))
    else:
        with pytest.raises(TypeError, match="takes blocks of Dense, Diagonal, LowRank or FlatSpectrum; got"):
            check_pair(GGN(), BlockDiagonal(PerLayer(), structure))


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if not isinstance(s, MatrixFree)], ids=str)
def test_memory_is_that_of_the_stored_numbers_and_known_before(structure, problem):
    risk = problem("mlp", "cross_entropy").risk
    assert estimate(GGN(), structure, risk).curvature.nbytes == structure.bytes(risk.space, 8)


@pytest.mark.parametrize("shapes", [((7, 10), (1,), (64,)), ((32,), (32,), (3, 3)), ((1,), (100,)), ((5,),)])
@pytest.mark.parametrize("structure", ["dense", "blocks", "diagonal"])
def test_entries_are_read_from_products_alone(shapes, structure, restricted, close):
    """Blocks end inside, at and across the limits of the columns that are read at once."""
    space = ParameterSpace(tuple("abc"[: len(shapes)]), tuple(Size(shape) for shape in shapes))
    rows = torch.randn(20, space.size, generator=torch.Generator().manual_seed(0)).double()

    class Risk:
        anchor = torch.zeros(space.size).double()

    Risk.space = space
    recipe = {"dense": Dense(), "blocks": BlockDiagonal(), "diagonal": Diagonal()}[structure]
    close(
        recipe.from_operator(GramOperator(rows), Risk()).dense(), restricted(structure, rows.T @ rows, space.sizes)
    )


@pytest.mark.parametrize(
    ("make", "needed", "match"),
    [
        (Dense, 800, r"Dense\(\) on 10 .* Use .*BlockDiagonal\(\) or Diagonal\(\), or raise Dense\(max_bytes="),
        (BlockDiagonal, 368, r"largest block of 6 parameters \(weight\) needs 368.0 B.*or Diagonal\(\)"),
        (lambda **limit: LowRank(Rank(3), **limit), 264, r"on 10 parameters needs 264.0 B.*Keep fewer eigenpairs"),
        (lambda **limit: FlatSpectrum(LowRank(Rank(3), **limit)), 264, "Keep fewer eigenpairs, use Diagonal"),
    ],
)
def test_a_structure_over_its_limit_names_its_size_and_a_remedy(make, needed, match):
    make(max_bytes=needed).check(SPACE, 8)
    with pytest.raises(MemoryError, match=match):
        make(max_bytes=needed - 1).check(SPACE, 8)


def test_a_dense_matrix_is_too_large_by_default_and_a_diagonal_never():
    with pytest.raises(MemoryError, match=r"Dense\(\) on 150,000 parameters needs 83.8 GiB.*limit of 4.0 GiB"):
        Dense().check(ParameterSpace(("w",), (Size((300, 500)),)), 4)
    Diagonal().check(ParameterSpace(("w",), (Size((10**6, 10**6)),)), 8)


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5.0 B"), (2048, "2.0 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**42, "4096.0 GiB")]
)
def test_sizes_for_people(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rank(0), ValueError, r"Rank\(k=...\) must be an integer of at least 1; got 0"),
        (lambda: Rank(2.0), ValueError, "at least 1"),
        (lambda: Energy(0), ValueError, "above 0, at most 1; got 0"),
        (lambda: Energy(1.1), ValueError, "above 0, at most 1; got 1.1"),
        (lambda: LowRank(5), TypeError, r"LowRank takes Rank\(k\) or Energy\(fraction\); got 5"),
        (lambda: LowRank(Rank(5), residual=Dense()), TypeError, r"takes Diagonal\(\) or None"),
        (lambda: LowRank(Rank(5), residual=True), TypeError, r"takes Diagonal\(\) or None"),
        (lambda: LowRank(Rank(5), max_rank=4), ValueError, "at least the 5 eigenpairs"),
        (lambda: LowRank(Energy(0.5, most_pairs=7), max_rank=6), ValueError, "at least the 7 eigenpairs"),
        (lambda: LowRank(Rank(1), max_bytes=None), ValueError, r"max_bytes=...\) must be an integer.* is a GiB"),
        (lambda: FlatSpectrum(Rank(5)), TypeError, r"takes a LowRank\(...\)"),
        (lambda: FlatSpectrum(LowRank(Rank(5), Diagonal())), ValueError, "without a residual"),
        (lambda: BlockDiagonal("layer"), TypeError, "takes PerParameter"),
        (lambda: BlockDiagonal(PerLayer), TypeError, "takes PerParameter"),
        (lambda: BlockDiagonal(PerLayer(), Dense), TypeError, "takes blocks"),
        (lambda: Kronecker(PiWeighted), TypeError, "takes PartialTraces"),
        (lambda: Kronecker("pi"), TypeError, "takes PartialTraces"),
        (lambda: EKFAC(PiWeighted), TypeError, "EKFAC takes PartialTraces"),
        (lambda: Kronecker(cut=0.9), TypeError, r"cut must be a Cut; got 0.9. Give a value such as Energy\(0.9\)"),
        (lambda: KeepTerms(0), ValueError, r"KeepTerms\(most=...\) must be an integer of at least 1; got 0"),
        (lambda: KeepTerms(1), ValueError, r"at least 2; got 1. For one pair take sums=PartialTraces\(\)"),
        (lambda: KeepTerms(3, KeepTerms()), TypeError, "merged must be an OnePair"),
        (lambda: MatrixFree(0), ValueError, r"MatrixFree\(fraction=...\) must lie in \(0, 1\]"),
    ],
)
def test_unusable_options_are_refused_when_they_are_given(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("place", [0, 5, 11])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found(value, place):
    numbers = torch.linspace(-1e38, 1e38, 12)
    assert all(map(all_finite, (numbers, numbers[:0], numbers.long())))
    numbers[place] = value
    assert not all_finite(numbers.reshape(3, 4).T)
    assert not all_finite(numbers.to(torch.complex64))
