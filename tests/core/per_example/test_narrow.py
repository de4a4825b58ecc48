"""Top eigenpairs by way of the leading directions of layers, against the matrix written out."""

import pytest
import torch
from torch import Size

from avalanche_curv import ParameterSpace
from avalanche_curv.core.per_example import narrow
from avalanche_curv.core.per_example.gram import OuterRows, PlainRows, RowsOperator

NAMES = {"weight": "weight", "bias": "bias"}


@pytest.fixture(autouse=True)
def solved(monkeypatch):
    """Eight directions of a layer, and the sizes of the matrices that Lanczos iteration was asked for."""
    monkeypatch.setattr(narrow, "DIRECTIONS", 8)
    monkeypatch.setattr(narrow, "SMALLER", 2)
    sizes, solve = [], narrow.top_of_operator

    def counted(operator, like, count):
        sizes.append(operator.size)
        return solve(operator, like, count)

    monkeypatch.setattr(narrow, "top_of_operator", counted)
    return sizes


def operator_of(rows, sizes, examples):
    shapes = tuple(Size(size) for size in sizes.values())
    return RowsOperator(rows, ParameterSpace(tuple(sizes), shapes), examples)


def operator(decay, dtype=torch.float64):
    """A layer of 30 inputs and 20 outputs of which those later in line are smaller, and two other parameters; in two
    pieces of 25 and 15 examples with 3 rows each, those of the first ten with large inputs being zero."""
    generator = torch.Generator().manual_seed(0)

    def rows(examples):
        a = torch.randn(examples, 30, generator=generator) * decay ** torch.arange(30)
        b = torch.randn(examples, 3, 20, generator=generator) * decay ** torch.arange(20)
        a[:10], b[:10] = 100 * torch.randn(10, 30, generator=generator), 0
        plain = torch.randn(3 * examples, 2, generator=generator)
        return [OuterRows(NAMES, a.to(dtype), b.to(dtype)), PlainRows({"other": 2}, plain.to(dtype))]

    return operator_of([rows(25), rows(15)], {"weight": (20, 30), "other": (2,), "bias": (20,)}, 40)


def written_out(operator):
    return operator.matmat(torch.eye(operator.size).to(operator.pieces[0][0].inputs))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_eigenpairs_are_those_of_the_whole_matrix_and_never_above_them(dtype, rounding, solved):
    c = operator(0.6, dtype)
    values, vectors = narrow.top_of_rows(c, torch.zeros(c.size, dtype=dtype), 2)
    assert solved == [8 * 8 + 2 + 8]
    whole = written_out(c)
    exact = torch.linalg.eigvalsh(whole).flip(0)[:2]
    assert (values <= exact * (1 + rounding)).all()
    torch.testing.assert_close(values, exact, rtol=max(1e-6, rounding), atol=0)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(2, dtype=dtype), rtol=0, atol=rounding)
    torch.testing.assert_close(((vectors @ whole) * vectors).sum(1), values, rtol=rounding, atol=0)
    assert ((whole @ vectors.T - vectors.T * values).norm(dim=0) < 1e-3 * values).all()


def test_a_step_with_the_whole_matrix_mends_what_directions_leave_out(solved):
    c = operator(0.8)
    exact = torch.linalg.eigvalsh(written_out(c)).flip(0)[:2]
    values, _ = narrow.top_of_rows(c, torch.zeros(c.size).double(), 2)
    assert solved == [74]
    found = narrow._Narrow.of(c)
    alone, _ = narrow.top_of_operator(found.operator, torch.zeros(found.operator.size).double(), 2)
    assert (exact - values).max() < 0.1 * (exact - alone).max()


@pytest.mark.parametrize(
    ("decay", "name", "value", "before"),
    [(0.85, "GAIN", 0.05, [74]), (0.6, "GAIN", -1.0, [74]), (0.6, "ERROR", -1.0, [74]), (0.6, "SMALLER", 10, [])],
)
def test_elsewhere_they_come_from_the_whole_matrix(decay, name, value, before, solved, monkeypatch):
    monkeypatch.setattr(narrow, name, value)
    c = operator(decay)
    values, vectors = narrow.top_of_rows(c, torch.zeros(c.size).double(), 2)
    assert solved == [*before, c.size]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(written_out(c)).flip(0)[:2])
    torch.testing.assert_close(vectors @ written_out(c), values[:, None] * vectors)


def test_many_eigenpairs_come_from_the_whole_matrix(solved):
    c = operator(0.6)
    narrow.top_of_rows(c, torch.zeros(c.size).double(), 3)
    assert solved == [c.size]


@pytest.mark.parametrize("others", [0, 190])
def test_a_large_eigenvalue_of_an_input_of_little_energy_is_noticed(others, solved, monkeypatch):
    """Each of eight inputs meets each of the 16 outputs once, which gives it the energy 16 · 12 in eigenvalues of 12;
    the ninth has 60, all in one; others hide it in a crowd of eigenvalues of 6."""
    width, pairs, crowd = 20 + others, torch.arange(128), torch.arange(16 * others)
    a, b = torch.zeros(129 + len(crowd), width).double(), torch.zeros(129 + len(crowd), 1, 16).double()
    a[pairs, pairs % 8], b[pairs, 0, pairs // 8] = 12**0.5, 1
    a[128, 8], b[128, 0, 0] = 60**0.5, 1
    a[129 + crowd, 20 + crowd // 16], b[129 + crowd, 0, crowd % 16] = 6**0.5, 1
    eight = torch.eye(width, 8).double()
    monkeypatch.setattr(narrow, "_leading", lambda parts: eight if parts[0].shape[1] == width else None)
    c = operator_of([[OuterRows({"weight": "weight"}, a, b)]], {"weight": (16, width)}, 1)
    values, _ = narrow.top_of_rows(c, torch.zeros(c.size).double(), 2)
    assert solved == [16 * 8, c.size]
    torch.testing.assert_close(values, torch.tensor([60.0, 12.0]).double())


def test_what_is_not_finite_is_said():
    c = operator(0.6)
    c.pieces[0][0].inputs[0] = torch.nan
    assert narrow.top_of_rows(c, torch.zeros(c.size).double(), 2)[0].isnan().all()
