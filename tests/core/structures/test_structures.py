import pytest
import torch
from torch import Size

from avalanche_curv import BlockDiagonal, Dense, Diagonal, ParameterSpace, PerParameter
from avalanche_curv.core.curvature.operators import GramOperator
from avalanche_curv.core.structures import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix
from avalanche_curv.core.structures.base import human_bytes
from avalanche_curv.core.structures.block_diagonal import Block

SPACE = ParameterSpace(("weight", "scale", "bias"), (Size((3, 2)), Size(()), Size((3,))))
GROWN = ParameterSpace(("new", "bias", "scale", "weight"), (Size((2,)), Size((5,)), Size(()), Size((5, 2))))


@pytest.fixture(params=["dense", "blocks", "diagonal"])
def structure(request):
    return request.param


def matrix_of(structure, symmetric, space=SPACE):
    if structure == "dense":
        return DenseMatrix(symmetric)
    if structure == "diagonal":
        return DiagonalMatrix(symmetric.diagonal().clone())
    blocks, start = [], 0
    for part in PerParameter().spaces(space):
        stop = start + part.size
        blocks.append(Block(part, DenseMatrix(symmetric[start:stop, start:stop].clone())))
        start = stop
    return BlockDiagonalMatrix(space, PerParameter(), tuple(blocks))


def symmetric(size, seed):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return root + root.T


@pytest.fixture
def pair(structure, restricted):
    """A matrix of the structure and its entries."""
    entries = symmetric(SPACE.size, 0)
    return matrix_of(structure, entries), restricted(structure, entries, SPACE.sizes)


def test_a_matrix_has_the_entries_that_its_structure_keeps(pair, close):
    close(pair[0].dense(), pair[1])


def test_product_and_quadratic_form_are_those_of_the_entries(pair, close):
    v = torch.arange(1.0, SPACE.size + 1).double()
    close(pair[0].product(v), pair[1] @ v)
    close(pair[0].quadratic_form(v), v @ pair[1] @ v)


def test_sums_and_multiples_are_those_of_the_entries(pair, structure, restricted, close):
    other = symmetric(SPACE.size, 1)
    kept = restricted(structure, other, SPACE.sizes)
    close(pair[0].plus(matrix_of(structure, other)).dense(), pair[1] + kept)
    close(pair[0].scaled(-2.5).dense(), -2.5 * pair[1])


def test_operations_leave_the_matrix_as_it_was(pair):
    before = [t.clone() for t in pair[0].tensors()]
    pair[0].plus(pair[0]), pair[0].scaled(2.0), pair[0].embedded(SPACE, GROWN), pair[0].map_spectrum(torch.exp)
    assert all(torch.equal(a, b) for a, b in zip(before, pair[0].tensors(), strict=True))


def test_an_embedded_matrix_is_zero_where_the_inner_space_has_nothing(pair, close):
    # new 0-1 | bias 2-6 | scale 7 | weight 8-17, of which rows 0-2 are 8-13
    where = torch.tensor([8, 9, 10, 11, 12, 13, 7, 2, 3, 4])
    expected = torch.zeros(18, 18).double()
    for i, row in enumerate(where):
        expected[row, where] = pair[1][i]
    close(pair[0].embedded(SPACE, GROWN).dense(), expected)


def test_a_function_of_the_spectrum_acts_on_the_eigenvalues(pair, close):
    values, vectors = torch.linalg.eigh(pair[1])
    close(pair[0].map_spectrum(torch.exp).dense(), vectors @ values.exp().diag() @ vectors.T, 1e-8)


def test_memory_is_that_of_the_stored_numbers(structure, pair):
    numbers = {"dense": 10**2, "blocks": 6**2 + 1 + 3**2, "diagonal": 10}[structure]
    recipe = {"dense": Dense(), "blocks": BlockDiagonal(), "diagonal": Diagonal()}[structure]
    assert pair[0].nbytes == recipe.bytes(SPACE, 8) == 8 * numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_makes_a_matrix_not_finite(value, pair):
    assert pair[0].is_finite()
    pair[0].tensors()[-1].view(-1)[-1] = value
    assert not pair[0].is_finite()


@pytest.mark.parametrize("shapes", [((7, 10), (1,), (64,)), ((32,), (32,), (3, 3)), ((1,), (100,)), ((5,),)])
def test_every_structure_reads_its_entries_from_products_alone(shapes, structure, problem, restricted, close):
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


def test_dense_over_its_limit_names_the_size_and_another_structure():
    large = ParameterSpace(("w",), (Size((300, 500)),))
    with pytest.raises(MemoryError, match=r"Dense\(\) on 150,000 parameters needs 83.8 GiB.*limit of 4.0 GiB"):
        Dense().check(large, 4)
    with pytest.raises(MemoryError, match=r"Use .*BlockDiagonal\(\) or Diagonal\(\), or raise Dense\(max_bytes="):
        Dense(max_bytes=799).check(SPACE, 8)
    Dense(max_bytes=800).check(SPACE, 8)


def test_blocks_over_their_limit_name_the_largest():
    with pytest.raises(MemoryError, match=r"largest block of 6 parameters \(weight\) needs 368.0 B.*or Diagonal\(\)"):
        BlockDiagonal(max_bytes=367).check(SPACE, 8)
    BlockDiagonal(max_bytes=368).check(SPACE, 8)


def test_a_diagonal_is_never_too_large():
    Diagonal().check(ParameterSpace(("w",), (Size((10**6, 10**6)),)), 8)


def test_structures_do_not_mix_silently():
    entries = symmetric(SPACE.size, 0)
    with pytest.raises(TypeError, match="diagonal can be added to a diagonal only; got DenseMatrix"):
        matrix_of("diagonal", entries).plus(matrix_of("dense", entries))
    with pytest.raises(TypeError, match="block diagonal can be added to one of the same blocks; got DiagonalMatrix"):
        matrix_of("blocks", entries).plus(matrix_of("diagonal", entries))


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5.0 B"), (2048, "2.0 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**42, "4096.0 GiB")]
)
def test_sizes_for_people(count, text):
    assert human_bytes(count) == text
