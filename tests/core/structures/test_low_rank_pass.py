"""The gradient of a low rank penalty by a compiled loop: against the dense matrix in float64, and against torch."""

import shutil

import pytest
import torch
from torch import nn

from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures import low_rank_pass
from avalanche_curv.core.structures.low_rank import LowRankMatrix
from avalanche_curv.core.structures.low_rank_pass import LowRankPass

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand"),
]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def parameters(drawn):
    found = [nn.Parameter(drawn(*shape)) for shape in ((3, 5), (1,), (0, 4), (17, 301), (1024,), ())]
    for parameter in found:
        parameter.grad = drawn(*parameter.shape)
    return found


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double()


@pytest.mark.parametrize("rank", [1, 7, 8, 19])
@pytest.mark.parametrize("with_diagonal", [False, True])
@pytest.mark.parametrize("with_slope", [False, True])
def test_it_adds_the_gradient_of_the_dense_matrix(rank, with_diagonal, with_slope, parameters, drawn):
    size = sum(parameter.numel() for parameter in parameters)
    anchor, vectors, values = drawn(size), drawn(rank, size) / size**0.5, drawn(rank)
    diagonal, slope = (drawn(size) if given else None for given in (with_diagonal, with_slope))
    delta, zero = flat(parameters) - anchor.double(), torch.zeros(size, dtype=torch.float64)
    product = vectors.double().T @ (values.double() * (vectors.double() @ delta))
    product += delta * (zero if diagonal is None else diagonal)
    pull = zero if slope is None else slope.double()
    found = LowRankPass(anchor, vectors, values, diagonal, slope, [p.shape for p in parameters])
    before, version = flat(p.grad for p in parameters), parameters[0].grad._version
    form, alone = found.gradient(parameters)
    assert found.add(parameters) == form == pytest.approx(float(delta @ product + 2 * pull @ delta), rel=1e-4, abs=1e-2)
    assert parameters[0].grad._version > version  # autograd sees that it was changed in place
    torch.testing.assert_close(flat(alone), pull + product, rtol=0, atol=3e-5)
    torch.testing.assert_close(flat(p.grad for p in parameters), before + pull + product, rtol=0, atol=3e-5)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_eigenvectors_in_16_bits_are_those_of_a_matrix_nearby(rank, parameters, drawn, monkeypatch):
    """C δ is off by as much as they are, along each of them: 3e-5 of Gaussian ones."""
    monkeypatch.setattr(low_rank_pass, "LARGE", 0)
    size = sum(parameter.numel() for parameter in parameters)
    vectors, values = torch.linalg.qr(drawn(size, rank))[0].T.contiguous(), 10.0 ** -torch.arange(float(rank))
    anchor = drawn(size)
    delta = flat(parameters) - anchor.double()
    found = LowRankPass(anchor, vectors, values, None, None, [p.shape for p in parameters])
    form, alone = found.gradient(parameters)
    held = torch.cat([*found._tiles.parts()])[:rank, :size]
    assert 1e-6 < (held - vectors).norm(dim=1).max() < 5e-5
    product = held.T @ (values.double() * (held @ delta))
    torch.testing.assert_close(flat(alone), product, rtol=0, atol=3e-6 * float(product.norm()))
    assert form == pytest.approx(float(delta @ product), rel=1e-5)
    exact = vectors.double().T @ (values.double() * (vectors.double() @ delta))
    assert (flat(alone) - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("max_rank", [None, 4])
def test_a_penalty_is_as_without_a_compiler(max_rank, drawn, monkeypatch):
    model = nn.Linear(30, 40)
    space = ParameterSpace.of(model)
    vectors = torch.linalg.qr(drawn(space.size, 4))[0].T.contiguous()
    curvature = LowRankMatrix(vectors, torch.arange(1.0, 5.0), None, max_rank)
    past = QuadraticModel(space, drawn(space.size), curvature, gradient=0.1 * drawn(space.size), constant=2.0)

    def evaluated():
        penalty = Penalty(past, 3.0)
        value = penalty(model)
        return value, penalty.last(), flat(torch.autograd.grad(value, [*model.parameters()])), penalty._one_pass

    *found, one_pass = evaluated()
    assert one_pass is not None
    monkeypatch.setattr(low_rank_pass, "library", lambda: None)
    for one, other in zip(found, evaluated()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_another_strength_reads_the_same_tiles(drawn):
    model = nn.Linear(30, 40)
    space = ParameterSpace.of(model)
    curvature = LowRankMatrix(torch.linalg.qr(drawn(space.size, 4))[0].T.contiguous(), torch.arange(1.0, 5.0))
    penalty = Penalty(QuadraticModel(space, drawn(space.size), curvature), 3.0)
    once, tiles = flat(penalty.gradients([*model.parameters()])), penalty._one_pass._tiles
    penalty.strength = 6.0
    torch.testing.assert_close(flat(penalty.gradients([*model.parameters()])), 2 * once)
    assert penalty._one_pass._tiles is tiles


def test_what_is_not_plain_or_of_another_type_is_left_alone(parameters, drawn):
    size, shapes = sum(parameter.numel() for parameter in parameters), [p.shape for p in parameters]
    found = LowRankPass(drawn(size), drawn(2, size), drawn(2), None, None, shapes)
    assert found.add(parameters) is not None
    parameters[3].data = parameters[3].data.T.contiguous().T
    assert found.add(parameters) is None
    double = LowRankPass(drawn(size).double(), drawn(2, size), drawn(2), None, None, shapes)
    assert double.add(parameters) is None
