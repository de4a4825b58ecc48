"""The gradient of a penalty by Kronecker products, added in place: against the dense matrix in float64."""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn

from avalanche_curv import ParameterSpace, Rank
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.structures.kronecker_cut import LeadingPart, leading_part
from avalanche_curv.core.structures.kronecker_matrix import KroneckerMatrix
from avalanche_curv.core.structures.kronecker_pass import FactoredLayer
from avalanche_curv.core.structures.kronecker_terms import Corrected, Factors

SHAPES = {
    "conv.weight": (19, 2, 3, 3), "conv.bias": (19,), "turned.weight": (17, 18), "turned.bias": (18,),
    "plain.weight": (20, 21), "shift.bias": (5,), "norm.weight": (7,), "unused.weight": (2, 3),
}  # fmt: skip


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def parameters(drawn):
    model = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(drawn(*shape)) for name, shape in SHAPES.items()})
    for parameter in model.parameters():
        parameter.grad = drawn(*parameter.shape)
    return model


def factors(drawn, out, inputs):
    g, a = drawn(out, out), drawn(inputs, inputs)
    return Factors(a @ a.T / inputs, g @ g.T / out)


def corrected(drawn, out, inputs):
    _, g, a = factors(drawn, out, inputs).eigen()
    return Corrected(drawn(out, inputs).square(), g, a)


def cut(drawn, out, inputs):
    return leading_part(corrected(drawn, out, inputs), Rank(3))


def two(drawn, out, inputs):
    return factors(drawn, out, inputs), cut(drawn, out, inputs)


def matrix_of(terms, drawn, space, *, simple=False):
    """One with a convolution, one without bias, a bias alone and a diagonal; and unless it is simple, a layer held
    transposed and one whose bias was frozen in some tasks."""
    kinds = [
        ("conv_weight", "conv_bias", False, 19, 19), ("plain_weight", None, False, 20, 21),
        (None, "shift_bias", False, 5, 1), ("turned_weight", "turned_bias", True, 18, 18),
        ("conv_weight", None, False, 19, 18),
    ]  # fmt: skip
    kinds = kinds[:3] if simple else kinds
    layers = []
    for weight, bias, transposed, out, inputs in kinds:
        found = terms(drawn, out, inputs)
        layers.append(FactoredLayer(weight, bias, found if isinstance(found, tuple) else (found,), transposed))
    diagonal = torch.zeros(space.size, dtype=torch.float64)
    diagonal[space.positions(ParameterSpace(("norm_weight",), (torch.Size([7]),)))] = drawn(7).square()
    return KroneckerMatrix(space, tuple(layers), diagonal)


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("terms", [factors, corrected, cut, two])
@pytest.mark.parametrize("with_slope", [False, True])
@pytest.mark.parametrize("simple", [False, True])
def test_a_penalty_adds_the_gradient_of_the_dense_matrix_step_after_step(
    terms, with_slope, simple, parameters, drawn, one_thread
):
    """What is simple, beside its products in one pass over memory."""
    space = ParameterSpace.of(parameters)
    matrix, anchor = matrix_of(terms, drawn, space, simple=simple), drawn(space.size)
    if terms is cut:
        assert isinstance(matrix.layers[0].terms[0], LeadingPart)
    slope, named = drawn(space.size) if with_slope else None, dict(parameters.named_parameters())
    penalty, dense = Penalty(QuadraticModel(space, anchor, matrix, slope, 0.5), 3.0), matrix.dense()
    found = penalty._one_pass
    in_one_pass = found._is_single and found._one_pass is not None and found._one_pass._is_usable()
    assert in_one_pass == (simple and shutil.which("cc") is not None)
    for _ in range(3):
        delta, before = flat(named.values()) - anchor, flat(p.grad for p in named.values())
        pull = dense @ delta + (0 if slope is None else slope)
        value = 0.5 + 0.5 * delta @ (pull + (0 if slope is None else slope))
        assert penalty.add(named, named) is None  # in place
        torch.testing.assert_close(flat(p.grad for p in named.values()), before + 3 * pull, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(penalty.last(), value, rtol=1e-11, atol=0)
        torch.testing.assert_close(flat(penalty.gradients([*named.values()])), 3 * pull, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(matrix.product(delta), dense @ delta, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            for parameter in named.values():
                parameter.add_(drawn(*parameter.shape))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda penalty: pickle.loads(pickle.dumps(penalty))])
@pytest.mark.parametrize("simple", [False, True])
def test_a_copy_has_memory_of_its_own(copied, simple, parameters, drawn, one_thread):
    space = ParameterSpace.of(parameters)
    matrix, anchor, values = matrix_of(cut, drawn, space, simple=simple), drawn(space.size), [*parameters.parameters()]
    penalty = Penalty(QuadraticModel(space, anchor, matrix), 1.0)
    penalty.gradients(values)
    other = copied(penalty)
    moved = [value.detach() + 1 for value in values]
    torch.testing.assert_close(flat(other.gradients(moved)), matrix.dense() @ (flat(moved) - anchor))
    torch.testing.assert_close(flat(penalty.gradients(values)), matrix.dense() @ (flat(values) - anchor))


def without_gradient(named):
    named["plain_weight"].grad = None


def in_another_order(named):
    named["conv_weight"].data = named["conv_weight"].data.to(memory_format=torch.channels_last)


def of_another_type(named):
    named["norm_weight"] = nn.Parameter(named["norm_weight"].detach().float())
    named["norm_weight"].grad = torch.zeros(7)


@pytest.mark.parametrize("change", [without_gradient, in_another_order, of_another_type])
def test_what_does_not_lie_as_the_anchor_does_is_added_by_products(change, parameters, drawn):
    space = ParameterSpace.of(parameters)
    matrix, anchor, named = matrix_of(cut, drawn, space), drawn(space.size), dict(parameters.named_parameters())
    penalty = Penalty(QuadraticModel(space, anchor, matrix), 1.0)
    change(named)
    before = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in named.values())
    expected = before + matrix.dense() @ (flat(named.values()) - anchor)
    assert penalty.add(named, named) is not None
    torch.testing.assert_close(flat(p.grad for p in named.values()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [factors, corrected, cut], ids=lambda kind: kind.__name__)
def test_a_matrix_that_was_multiplied_by_goes_to_another_type(kind, drawn):
    space = ParameterSpace(("weight", "bias"), (torch.Size((9, 10)), torch.Size((9,))))
    layer = FactoredLayer("weight", "bias", (kind(drawn, 9, 11),))
    single = KroneckerMatrix(space, (layer,), torch.zeros(99).double()).to(torch.zeros(1))
    vector = drawn(99)
    before = single.product(vector.float())
    double = single.to(vector)
    torch.testing.assert_close(double.product(vector), double.dense() @ vector)
    torch.testing.assert_close(single.product(vector.float()), before)
