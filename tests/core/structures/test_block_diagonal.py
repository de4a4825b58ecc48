"""Blocks in every structure that fits, against those of the whole matrix."""


import pytest
import torch

from avalanche_curv import (
    GGN,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Energy,
    Hessian,
    LowRank,
    PerLayer,
    PerParameter,
    Rank,
    estimate,
)


@pytest.mark.parametrize("block", [LowRank(Rank(2)), LowRank(Rank(2), Diagonal()), LowRank(Energy(0.7))], ids=str)
@pytest.mark.parametrize("per", [PerParameter(), PerLayer()], ids=str)
@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), BatchedEmpiricalFisher(2), Hessian()], ids=str)
def test_blocks_of_low_rank_are_those_of_the_blocks_of_the_matrix(
    kind, per, block, architecture, problem, close, exact, best
):
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
def test_blocks_of_other_structures_are_those_of_the_matrix(kind, per, block, problem, close, exact, best):
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
