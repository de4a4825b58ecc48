"""Subspaces by orthonormal rows against QR, against scipy's angles, and by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from avalanche_curv.core.projection import subspace as module
from avalanche_curv.core.projection.subspace import Subspace, orthonormal, principal_angles, remainder, tolerance


def unit_rows(count, dimension, seed=0, kind=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draws)[0].T.contiguous().to(kind)


def empty(dimension, kind=torch.float64):
    return Subspace.empty(torch.zeros(dimension, dtype=kind))


def merged(parts, kind=torch.float64, rank=None):
    subspace = empty(parts[0].shape[1], kind)
    for task, rows in enumerate(parts):
        values = torch.logspace(0, -2, len(rows), dtype=torch.float64) * (1 + task % 3)
        subspace = subspace.plus(rows, values, float(values.sum()), task).limited(rank)
    return subspace


def skew(rows):
    """How far rows are from orthonormal."""
    rows = rows.double()
    return float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())


def related_tasks(count=50, rank=8, dimension=400):
    """Of eight directions, two are the same for all tasks up to 1e-5, one up to 1e-3, and one is a duplicate."""
    shared = unit_rows(3, dimension, seed=99)
    for task in range(count):
        rows = unit_rows(rank, dimension, seed=task)
        rows[:2] = shared[:2] + 1e-5 * rows[:2]
        rows[2] = shared[2] + 1e-3 * rows[2]
        rows[3] = shared[0]
        yield orthonormal(rows)


@pytest.mark.parametrize("rank", [None, 40, 8])
def test_the_basis_is_orthonormal_to_1e_6_in_float32_after_50_merges(rank):
    subspace = empty(400, torch.float32)
    for task, rows in enumerate(related_tasks()):
        values = torch.rand(len(rows), generator=torch.Generator().manual_seed(task))
        subspace = subspace.plus(rows.float(), values, task=task).limited(rank)
        assert skew(subspace.rows) < 1e-6
    assert subspace.rank == rank if rank else 200 < subspace.rank < 400
    if rank is None:
        assert max(skew(share.coordinates) for share in subspace.shares) < 1e-12


def test_rounding_does_not_add_up_over_many_cuts():
    cut = merged([unit_rows(4, 60, task, torch.float32) for task in range(200)], torch.float32, rank=12)
    assert skew(cut.rows) < 5e-7  # without care it is 1e-6 then


def test_a_space_that_fills_up_ends_as_the_whole_space():
    parts = [unit_rows(4, 30, seed, torch.float32) for seed in range(50)]
    whole = merged(parts, torch.float32)
    assert whole.is_whole
    assert whole.rank == whole.dimension == 30
    assert skew(whole.rows) < 1e-6
    assert not empty(3).is_whole


@pytest.mark.parametrize(("kind", "rounding"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_merging_in_any_order_gives_the_span_of_all_rows(kind, rounding):
    parts = [unit_rows(8, 400, seed, kind) for seed in range(6)]
    parts[3][:4], parts[5][4:] = parts[0][:4], parts[1][4:]
    parts = [orthonormal(rows) for rows in parts]
    u, sizes, _ = torch.linalg.svd(torch.cat(parts).double().T, full_matrices=False)
    whole = u[:, sizes > 1e-3].T
    for some in (parts, parts[::-1], parts[3:] + parts[:3]):
        angles = principal_angles(whole, merged(some, kind).rows)
        assert len(angles) == len(whole) == 40
        assert angles.max() < rounding


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_no_direction_of_any_task_is_lost_by_more_than_the_tolerance(kind):
    """Whatever the order, also where tasks differ by about as much as counts."""
    parts = [rows.to(kind) for rows in related_tasks(12)]
    for some in (parts, parts[::-1]):
        union = merged(some, kind)
        for rows in parts:
            assert (rows - union.component(rows)).norm(dim=1).max() < 2 * tolerance(kind)


def projector(subspace):
    return subspace.rows.T @ subspace.rows


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_what_is_merged_twice_adds_nothing(kind):
    once = merged([unit_rows(6, 50, 0, kind), unit_rows(6, 50, 1, kind)], kind)
    assert once.joined(once.rows) is once
    assert once.joined(unit_rows(6, 50, 1, kind)) is once
    turned = unit_rows(6, 6, 5, kind) @ unit_rows(6, 50, 1, kind)  # another basis of the same
    twice = once.plus(turned, torch.ones(6), task=2)
    assert twice.rows is once.rows
    assert [share.task for share in twice.shares] == [0, 1, 2]


@pytest.mark.parametrize(("kind", "counts", "does_not"), [(torch.float32, 1e-4, 3e-6), (torch.float64, 1e-6, 3e-8)])
def test_a_direction_counts_from_a_hundred_roundings_on(kind, counts, does_not):
    assert does_not < tolerance(kind) < counts
    first, other = unit_rows(2, 500)
    for size, rank in ((counts, 2), (does_not, 1)):
        near = first + size * other
        joined = empty(500, kind).joined(first[None].to(kind)).joined((near / near.norm())[None].to(kind))
        assert joined.rank == rank
        if rank == 2:  # the small remainder is the right one
            assert abs(float(joined.rows[1].double() @ other)) == pytest.approx(1, abs=1e-6)


def test_dependent_and_repeated_rows_are_found_out():
    three = unit_rows(3, 40, kind=torch.float32)
    mixed = torch.cat([three, three, (three[:1] + three[1:2]) / 2**0.5, three[2:] + 1e-6])
    found = remainder(mixed, torch.empty(0, 40))
    assert len(found) == 3
    assert skew(found) < 1e-6
    assert principal_angles(found, three).max() < 1e-5
    assert len(remainder(mixed, three)) == 0
    assert len(orthonormal(torch.zeros(4, 40))) == 0
    assert orthonormal(torch.zeros(0, 40)).shape == (0, 40)


def test_rows_that_are_held_in_pieces_give_the_same(monkeypatch):
    rows = torch.randn(7, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = orthonormal(rows)
    monkeypatch.setattr(module, "GRAM_ENTRIES", 50)
    torch.testing.assert_close(orthonormal(rows), whole, rtol=0, atol=1e-12)


def test_a_limited_rank_keeps_the_directions_of_largest_summed_curvature():
    """Two tasks whose curvatures are diagonal: 5 e0 + 4 e1 + 3 e2, and 2.5 e2 + 4.5 e3 + e4. Of the sum 5, 4, 5.5, 4.5
    and 1 the largest three are those of e2, e0 and e3."""
    e = torch.eye(6, dtype=torch.float64)
    both = empty(6).plus(e[:3], torch.tensor([5.0, 4.0, -3.0]), 12.0, 0)  # negative curvature counts by its size
    both = both.plus(e[2:5], torch.tensor([2.5, 4.5, 1.0]), 10.0, 1)
    kept = both.limited(3)
    assert both.rank == 5
    torch.testing.assert_close(projector(kept), torch.diag(torch.tensor([1.0, 0, 1, 1, 0, 0]).double()))
    assert kept.energy == pytest.approx((5 + 3 + 2.5 + 4.5) / 22)
    assert [share.inside for share in kept.shares] == pytest.approx([8, 7])
    assert both.limited(5) is both.limited(None) is both


def test_a_limited_rank_is_the_top_eigenspace_of_the_summed_curvature():
    """Of Σ_t V_tᵀ Λ_t V_t, written out."""
    parts = [unit_rows(5, 30, seed) for seed in range(3)]
    values = [torch.rand(5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]
    union = empty(30)
    for task, (rows, curvature) in enumerate(zip(parts, values)):
        union = union.plus(rows, curvature, task=task)
    dense = sum(rows.T @ curvature.diag() @ rows for rows, curvature in zip(parts, values))
    top = torch.linalg.eigh(dense)[1][:, -4:]
    torch.testing.assert_close(projector(union.limited(4)), top @ top.T, rtol=0, atol=1e-10)


def test_energy_by_hand():
    """4 and 1 of a trace of 6 are kept, then 2 of 2, then 3 of an unknown one, which does not count."""
    e = torch.eye(4, dtype=torch.float64)
    subspace = empty(4).plus(e[:2], torch.tensor([4.0, 1.0]), 6.0)
    assert subspace.energy == pytest.approx(5 / 6)
    subspace = subspace.plus(e[1:2], torch.tensor([2.0]), 2.0, 1)
    assert subspace.energy == pytest.approx(7 / 8)
    assert subspace.plus(e[3:], torch.tensor([3.0])).energy == pytest.approx(7 / 8)
    assert math.isnan(empty(4).energy)
    assert math.isnan(empty(4).plus(e[:1], torch.zeros(1), 0.0).energy)


@pytest.mark.parametrize(("j", "k", "near"), [(3, 5, 1.0), (5, 3, 1e-6), (4, 4, 1e-9), (1, 6, 0.0), (6, 1, 10.0)])
def test_principal_angles_are_those_of_scipy(j, k, near):
    """Also where cosines alone would say zero."""
    first = unit_rows(j, 20, seed=1)
    turned = torch.cat([first, unit_rows(8, 20, seed=2)])[:k] + near * unit_rows(k, 20, seed=3)
    second = torch.linalg.qr(turned.T)[0].T
    expected = np.sort(scipy.linalg.subspace_angles(first.numpy().T, second.numpy().T))
    angles = principal_angles(first, second).numpy()
    assert angles.shape == (min(j, k),)
    np.testing.assert_allclose(angles, expected, rtol=1e-5, atol=1e-14)


def test_principal_angles_of_lines_by_hand():
    for angle in (0.0, 1e-8, 0.3, math.pi / 4, 1.2, math.pi / 2):
        line = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64)
        assert principal_angles(line, torch.eye(3, dtype=torch.float64)[:1]).item() == pytest.approx(angle, abs=1e-12)


def test_components_by_task_are_the_product_of_projections():
    parts = [unit_rows(3, 12, seed) for seed in range(3)]
    vectors = torch.randn(4, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    left = vectors
    for rows in parts:
        left = left @ (torch.eye(12, dtype=torch.float64) - rows.T @ rows)
    union = merged(parts)
    for some, expected in ((vectors, left), (vectors[:1], left[:1])):
        found = union.withdraw(some.clone(), some, by_task=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert (union.component(left).norm() / left.norm()) > 0.05  # it leaks
    first = merged(parts[:1])
    alone = first.withdraw(vectors.clone(), vectors, by_task=True)
    torch.testing.assert_close(alone, vectors - first.component(vectors), rtol=0, atol=1e-13)


def test_a_component_is_the_projection():
    subspace = merged([unit_rows(4, 12)])
    vectors = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    torch.testing.assert_close(subspace.component(vectors), vectors @ projector(subspace))
    torch.testing.assert_close(subspace.component(vectors[:1]), vectors[:1] @ projector(subspace))
    assert not empty(12).component(vectors).any()


def test_a_restricted_subspace_forbids_just_the_steps_that_leave_it_alone():
    """Steps of some coordinates, others at rest: y is allowed if and only if (y, 0) is orthogonal to the whole."""
    subspace = merged([unit_rows(2, 8), unit_rows(2, 8, seed=1)])
    at = torch.tensor([1, 2, 3, 5, 6, 7])
    part = subspace.restricted(at)
    columns = subspace.rows[:, at]
    assert part.rank == 4
    assert skew(part.rows) < 1e-12
    step = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    allowed = step - part.component(step)
    assert (columns @ allowed.T).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(columns) == part.rank
    few = subspace.restricted(torch.tensor([0, 4]))  # four conditions on two numbers
    assert few.is_whole


def test_memory_is_counted_in_bytes():
    """Three rows of five float32, and K [3, 3] and three values of float64."""
    subspace = empty(5, torch.float32).plus(unit_rows(3, 5, kind=torch.float32), torch.ones(3))
    assert subspace.nbytes == 3 * 5 * 4 + (3 * 3 + 3) * 8
    assert empty(5).nbytes == 0
