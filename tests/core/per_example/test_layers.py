import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from avalanche_curv import (
    GGN,
    BatchedEmpiricalFisher,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Hessian,
    estimate,
)
from avalanche_curv.core.fidelity.monitor import example_models
from avalanche_curv.core.per_example.layers import linear_layers
from avalanche_curv.core.structures.rules import by_products


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head(self.shared(self.shared(inputs).tanh()))


class Registered(nn.Module):
    """The same layer under two names, called once."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.body = nn.Sequential(self.first, nn.Tanh(), nn.Linear(5, 3))

    def forward(self, inputs):
        return self.body(inputs)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.decode.weight = self.encode.weight

    def forward(self, inputs):
        return self.head(self.decode(self.encode(inputs).tanh()).tanh())


class Tokens(nn.Module):
    """The layers see [N, 2, 2]."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(2, 3), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.mix(inputs.view(-1, 2, 2)).tanh().flatten(1))


class Functional(nn.Module):
    """The weight of a layer is used beside the layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.head((self.body(inputs) + linear(inputs, self.body.weight)).tanh())


class Scaled(nn.Linear):
    """A subclass with a forward of its own that hooks do not show."""

    def forward(self, inputs):
        return super().forward(inputs) + inputs @ self.weight.T


class BareParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs):
        return self.scale * self.layer(inputs)


def normalised():
    norm = nn.BatchNorm1d(5)
    norm.running_mean, norm.running_var = torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3))


class Cubed(nn.Module):
    def forward(self, weight):
        return weight**3


def parametrised():
    layer = nn.Linear(4, 5)
    nn.utils.parametrize.register_parametrization(layer, "weight", Cubed())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))


OTHERS = {
    "used twice": UsedTwice,
    "tied": Tied,
    "three axes": Tokens,
    "functional": Functional,
    "own forward": lambda: nn.Sequential(Scaled(4, 3)),
    "bare parameter": BareParameter,
    "norm with parameters": normalised,
    "parametrised weight": parametrised,
}


@pytest.mark.parametrize("model", OTHERS)
def test_layers_are_not_offered_where_outer_products_would_be_wrong(model, new_problem, make_model):
    assert linear_layers(new_problem(make_model(OTHERS[model]).eval(), "cross_entropy").risk) is None


@pytest.mark.parametrize("model", ["used twice", "three axes", "functional", "own forward"])
def test_nor_at_a_minimum_where_every_gradient_vanishes(model, exact_problem, make_model, losses):
    made = make_model(OTHERS[model])
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    known = exact_problem(made, losses["mean_square"], inputs, made(inputs).detach())
    assert known.paper.gradients.abs().max() < 1e-15
    assert linear_layers(known.risk) is None


@pytest.mark.parametrize("scale", [1e-6, 10.0])
def test_nor_for_inputs_of_another_scale(scale, exact_problem, make_model, losses):
    inputs = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    odd, plain = make_model(Functional), make_model(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    assert linear_layers(exact_problem(odd, losses["cross_entropy"], inputs, targets).risk) is None
    assert linear_layers(exact_problem(plain, losses["cross_entropy"], inputs, targets).risk) is not None


@pytest.mark.parametrize("model", [*OTHERS, "registered twice"])
def test_estimates_and_pictures_are_exact_there_too(model, new_problem, make_model, close):
    made = make_model({**OTHERS, "registered twice": Registered}[model]).eval()
    known = new_problem(made, "cross_entropy", examples=4)
    for curvature, matrices in (
        (GGN(), known.paper.ggns), (EmpiricalFisher(), known.paper.empirical_fishers),
        (Hessian(), known.paper.hessians),
    ):
        matrix = matrices.mean(0)
        close(estimate(curvature, Dense(), known.risk).curvature.dense(), matrix)
        close(estimate(curvature, Diagonal(), known.risk).curvature.values, matrix.diagonal())
        if not isinstance(curvature, EmpiricalFisher):
            close(by_products(curvature, Diagonal(), known.risk).dense(), matrix.diagonal().diag())
        theta = known.risk.anchor + 0.2
        found = example_models(curvature, known.risk).compare(theta).linear
        delta = theta - known.risk.anchor
        predicted = known.paper.gradients @ delta + 0.5 * (matrices @ delta) @ delta
        close(found.kappa, known.paper.losses(theta) - known.paper.losses(known.risk.anchor) - predicted)
        gradients = known.paper.gradients + matrices @ delta
        close(found.gamma, (known.paper.gradients_at(theta) - gradients).norm(dim=1), 1e-9)
    means = known.paper.batch_gradients(2)
    close(estimate(BatchedEmpiricalFisher(2), Diagonal(), known.risk).curvature.values, means.square().mean(0))


@pytest.mark.parametrize("model", [UsedTwice, Registered, Tied])
def test_a_frozen_model_keeps_its_parameters_through_estimates(model, new_problem, make_model):
    """`torch.func.functional_call` does not give back those of a module that is registered twice."""
    risk = new_problem(make_model(model), "cross_entropy").risk
    held = list(risk.base.parameters())
    for curvature in (GGN(), Hessian()):
        estimate(curvature, Dense(), risk)
        by_products(curvature, Diagonal(), risk)
        example_models(curvature, risk).compare(risk.anchor + 0.1)
    assert all(a is b for a, b in zip(risk.base.parameters(), held, strict=True))


def test_a_layer_registered_under_two_names_and_called_once_is_a_linear_layer(new_problem, make_model):
    assert linear_layers(new_problem(make_model(Registered), "cross_entropy").risk) is not None


def test_each_head_of_one_frozen_model_has_its_own_layers():
    trunk, heads = nn.Linear(4, 3), [nn.Linear(3, 2), nn.Linear(3, 2)]
    model, data = nn.Sequential(trunk, *heads).double(), [(torch.randn(5, 4).double(), torch.randint(2, (5,)))]

    def risk(head):
        take = lambda base, x: base[1 + head](base[0](x).tanh())  # noqa: E731
        return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), data, forward=take)

    first, second = risk(0), risk(1)
    assert [*linear_layers(first).folded] == [first.base[0], first.base[1]]
    assert [*linear_layers(second.at(first)).folded] == [first.base[0], first.base[2]]


def test_taps_see_inputs_and_outputs_and_leave_no_hook(problem):
    risk = problem("mlp", "cross_entropy").risk
    layers = linear_layers(risk)
    x = next(iter(risk))[0]
    with torch.enable_grad(), layers.tapped(len(x)) as taps:
        risk.outputs(x)
    assert [tap.layer for tap in taps] == [risk.base[0], risk.base[2]]
    assert torch.equal(taps[0].inputs, x)
    assert torch.equal(taps[1].inputs, taps[0].outputs.tanh())
    assert not any(m._forward_hooks for m in risk.base.modules())


def test_hooks_are_removed_after_an_error(problem):
    risk = problem("mlp", "cross_entropy").risk
    layers = linear_layers(risk)
    with pytest.raises(RuntimeError), layers.tapped(1):
        risk.outputs(torch.zeros(1, 9).double())
    assert not any(m._forward_hooks for m in risk.base.modules())


def test_gradient_and_squares_from_outer_products_on_paper(new_problem, make_model):
    risk = new_problem(make_model(lambda: nn.Linear(4, 2)), "summed_square").risk
    layers = linear_layers(risk)
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 1.0, 0.0, 3.0]]).double()
    with torch.enable_grad(), layers.tapped(len(x)) as taps:
        risk.outputs(x)
    b = torch.tensor([[1.0, -1.0], [2.0, 0.0]]).double()
    rows = layers.rows(taps[0], b, 2)
    assert rows["weight"].sum(0).tolist() == [[1, 4, 0, 6], [-1, -2, 0, 0]]
    assert rows["bias"].sum(0).tolist() == [3, -1]
    squares = layers.squares(taps[0], [b], 2)
    assert squares["weight"].tolist() == [[1, 8, 0, 36], [1, 4, 0, 0]]
    assert squares["bias"].tolist() == [5, 1]
