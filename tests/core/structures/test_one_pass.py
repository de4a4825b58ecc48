"""The gradient of a diagonal penalty in one pass over memory: to the bit what torch adds in three."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import CurvatureRegularizer, Diagonal, EmpiricalFisher
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.risk.parameters import NamedParameters, ParameterSpace, canonical_parameters
from avalanche_curv.core.structures import one_pass
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.one_pass import OnePass, loop

pytestmark = pytest.mark.usefixtures("one_thread")
compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is at hand")


def drawn(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    parameters = [nn.Parameter(draw(*shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = draw(*parameter.shape)
    count = sum(parameter.numel() for parameter in parameters)
    return parameters, draw(count), draw(count).square(), [parameter.shape for parameter in parameters]


@compiled
@pytest.mark.parametrize("with_slope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_adds_to_the_bit_what_torch_adds_in_three(dtype, with_slope):
    parameters, anchor, values, shapes = drawn(dtype, (3, 5), (1,), (0, 4), (17, 1001), (4096,), ())
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    delta, slope = theta - anchor, values.flip(0).sqrt() if with_slope else None
    pull = values * delta if slope is None else values * delta + slope
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in parameters]) + pull
    before, one_pass = parameters[0].grad._version, OnePass(anchor, values, shapes, slope)
    alone, gradients = one_pass.gradient(parameters)
    assert torch.equal(torch.cat([gradient.reshape(-1) for gradient in gradients]), pull)
    assert [gradient.shape for gradient in gradients] == shapes
    form = one_pass.add(parameters)
    assert form == alone
    assert torch.equal(torch.cat([parameter.grad.reshape(-1) for parameter in parameters]), expected)
    assert torch.equal(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]), theta)
    total = (values.double() * delta.double().square()).sum()
    total += 0 if slope is None else 2 * slope.double() @ delta.double()
    assert form == pytest.approx(float(total), rel=1e-5)
    assert parameters[0].grad._version > before  # autograd sees that it was changed in place


def without_gradient(parameters):
    parameters[1].grad = None


def transposed(parameters):
    parameters[0].data = parameters[0].data.T.contiguous().T


def of_a_sparse_gradient(parameters):
    parameters[0].grad = parameters[0].grad.to_sparse()


def of_a_transposed_gradient(parameters):
    parameters[0].grad = parameters[0].grad.T.contiguous().T


def grown(parameters):
    parameters[0] = nn.Parameter(torch.zeros(4, 5))
    parameters[0].grad = torch.zeros(4, 5)


def of_another_type(parameters):
    parameters[1] = nn.Parameter(parameters[1].detach().double())
    parameters[1].grad = torch.zeros(7, dtype=torch.float64)


def missing(parameters):
    parameters[1] = None


def on_no_device(parameters):
    parameters[1] = nn.Parameter(parameters[1].detach().to("meta"))
    parameters[1].grad = torch.zeros(7, device="meta")


@compiled
@pytest.mark.parametrize(
    "change",
    [
        without_gradient, transposed, of_a_sparse_gradient, of_a_transposed_gradient, grown, of_another_type, missing,
        on_no_device,
    ],
)  # fmt: skip
def test_one_pass_touches_nothing_where_one_of_the_parameters_is_not_plain(change):
    parameters, anchor, values, shapes = drawn(torch.float32, (3, 5), (7,), (2,))
    one_pass, last = OnePass(anchor, values, shapes), parameters[2].grad.clone()
    assert one_pass.add(parameters) is not None
    parameters[2].grad.copy_(last)
    change(parameters)
    assert one_pass.add(parameters) is None
    assert torch.equal(parameters[2].grad, last)


@compiled
def test_several_threads_are_left_to_torch():
    parameters, *rest = drawn(torch.float32, (3, 5))
    torch.set_num_threads(2)
    assert OnePass(*rest).add(parameters) is None


@compiled
def test_a_penalty_in_the_loss_has_the_same_gradient_without_a_compiler(monkeypatch):
    parameters, anchor, values, _ = drawn(torch.float32, (30, 50), (7,))
    model = nn.ParameterList(parameters)
    past = QuadraticModel(ParameterSpace.of(model), anchor, DiagonalMatrix(values), constant=2.0)

    def gradients(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*model.parameters()])])

    penalty = Penalty(past, 3.0)
    value = penalty(model)
    last, found = penalty.last(), gradients(value)
    monkeypatch.setattr(one_pass, "loop", lambda *kind: None)
    plain = penalty(model)
    assert torch.equal(gradients(plain), found)
    for one, other in ((value, plain), (last, penalty.last())):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_without_a_compiler_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert loop.__wrapped__("float", True, False, True, False) is None
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o700)
    monkeypatch.setenv("CC", str(failing))
    assert loop.__wrapped__("float", True, False, True, False) is None


def trained(model, optimizer_of, structure):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)
    regularizer = CurvatureRegularizer(2.0, curvature=EmpiricalFisher(), structure=structure, guard=None)
    values = []
    for _ in range(3):
        regularizer.absorb(model, nn.CrossEntropyLoss(), [(x, y)])
        optimizer = optimizer_of(model.parameters())
        with regularizer.attach(optimizer, model):
            for _ in range(4):
                optimizer.zero_grad()
                cross_entropy(model(x.flip(0)), y).backward()
                optimizer.step()
                values.append(float(regularizer.last_penalty))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), values


@compiled
@pytest.mark.parametrize("optimizer_of", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.01)])
def test_training_with_and_without_a_compiler_ends_at_equal_weights(optimizer_of, make, monkeypatch):
    model = make(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)))
    done, add = [], OnePass.add
    monkeypatch.setattr(OnePass, "add", lambda *args: done.append(add(*args)) or done[-1])
    with_compiler, values = trained(copy.deepcopy(model), optimizer_of, Diagonal())
    assert len(done) == 12
    assert None not in done
    monkeypatch.setattr(one_pass, "loop", lambda *kind: None)
    without, plain_values = trained(copy.deepcopy(model), optimizer_of, Diagonal())
    assert done[12:] == 12 * [None]
    assert torch.equal(with_compiler, without)
    assert values == pytest.approx(plain_values, rel=1e-4)
    assert values[-1] > 0


def test_names_are_found_anew_where_a_model_has_changed():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2)))
    named = NamedParameters(model)

    def change_parameter():
        model[0].weight = nn.Parameter(torch.ones(2, 2))

    def change_bias():
        model[0].bias = nn.Parameter(torch.ones(2))

    def change_module():
        model[1][0] = nn.Linear(2, 2)

    def add_module():
        model[1].append(nn.Linear(2, 1))

    def take_module():
        del model[0]

    for change in (change_parameter, change_bias, change_module, add_module, take_module):
        before = named()
        assert named() is before
        change()
        found = named()
        assert found.keys() == canonical_parameters(model).keys()
        assert all(found[name] is p for name, p in model.named_parameters())
