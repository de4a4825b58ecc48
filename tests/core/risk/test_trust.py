"""Derivatives that torch gets wrong are not used: every way to curvature against plain loops in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from avalanche_curv.core import (
    GGN,
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Hessian,
    LowRank,
    MatrixFree,
    Rank,
    estimate,
    landscape,
)
from avalanche_curv.core.fidelity.monitor import example_models
from avalanche_curv.core.landscape import Lanczos
from avalanche_curv.core.risk.known import is_plain, is_same

CE = nn.CrossEntropyLoss()
STRUCTURES = (Dense(), Diagonal(), BlockDiagonal(), LowRank(Rank(50)), MatrixFree())


class Prototypes(nn.Module):
    """`vmap` over cotangents of the derivative of `cdist` is wrong in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.prototypes = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.features(x), self.prototypes)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x)


class Routed(nn.Module):
    """Each example goes to one of two layers, by its values; the first ones all go to one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        where = x[:, 0] > 0
        hidden = torch.zeros_like(x)
        hidden[where] = self.one(x[where])
        if not where.all():
            hidden[~where] = self.other(x[~where])
        return self.head(hidden.tanh())


class WrongTwice(torch.autograd.Function):
    """sin, whose second derivative is wrong and whose forward derivative is missing."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].detach().cos()


class Straight(torch.autograd.Function):
    """A constant with the gradient of the identity, whose second derivative is wrong."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad + x - x.detach()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(WrongTwice.apply(self.one(x)))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "distances": Prototypes,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)),
    "mapped": Mapped,
    "routed": Routed,
    "custom": Custom,
    "pruned": pruned,
    "hooked": hooked,
}


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """∇ℓ_i [N, P], one example after the other."""
    parameters = list(model.parameters())
    rows = [
        torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), parameters, allow_unused=True)
        for a, b in zip(x, y)
    ]
    return torch.stack([
        torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(row, parameters)])
        for row in rows
    ])


def ggn(model: nn.Module, x: Tensor) -> Tensor:
    parameters, total = list(model.parameters()), 0
    for one in x:
        outputs = model(one[None])[0]
        rows = [
            torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for o in outputs
        ]
        jacobian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        p = outputs.softmax(0).detach()
        total = total + jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian
    return total / len(x)


def differences(model: nn.Module, x: Tensor, y: Tensor, step: Tensor, h: float = 1e-5) -> Tensor:
    """∇²ℓ_i s [N, P] by symmetric differences of gradients."""
    parameters, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    sides = []
    for sign in (1, -1):
        for p, start, part in zip(parameters, before, step.split([p.numel() for p in parameters])):
            p.data.copy_(start + sign * h * part.view_as(p))
        sides.append(gradients(model, x, y))
    for p, start in zip(parameters, before):
        p.data.copy_(start)
    return (sides[0] - sides[1]) / (2 * h)


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    size = sum(p.numel() for p in model.parameters())
    return torch.stack([differences(model, x, y, unit).mean(0) for unit in torch.eye(size, dtype=torch.float64)])


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """name, model, risk, inputs, targets."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[request.param]().double().eval()
        x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    x[:4, 0] = x[:4, 0].abs()
    return request.param, model, EmpiricalRisk.snapshot(model, CE, [(x[:4], y[:4]), (x[4:], y[4:])]), x, y


@pytest.mark.parametrize("kind", [GGN(), Hessian()], ids=str)
def test_curvature_is_that_of_loops_by_every_way(kind, case, monkeypatch) -> None:
    _, model, risk, x, y = case
    expected = ggn(model, x) if kind == GGN() else hessian(model, x, y)
    tolerance = {"rtol": 1e-6, "atol": 1e-7 * float(expected.abs().max())}
    for structure in STRUCTURES:
        found = estimate(kind, structure, risk).curvature.dense()
        wanted = expected
        if isinstance(structure, Diagonal):
            wanted = expected.diagonal().diag()
        elif isinstance(structure, BlockDiagonal):
            blocks = torch.block_diag(*[torch.ones(n, n) for n in risk.space.sizes])
            wanted = torch.where(blocks.bool(), expected, 0.0)
        torch.testing.assert_close(found, wanted, **tolerance)
    vectors = torch.randn(risk.space.size, 2, dtype=torch.float64)
    torch.testing.assert_close(kind.operator(risk).matmat(vectors), expected @ vectors, **tolerance)
    assert landscape(kind, risk).trace == pytest.approx(float(expected.trace()), rel=1e-6)


@pytest.mark.parametrize("kind", [GGN(), Hessian()], ids=str)
def test_fidelity_is_that_of_loops(kind, case) -> None:
    _, model, risk, x, y = case
    step = 0.05 * torch.randn(risk.space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = example_models(kind, risk).compare(risk.anchor + step)
    if kind == GGN():
        expected = torch.stack([0.5 * step @ ggn(model, one[None]) @ step for one in x])
    else:
        expected = 0.5 * differences(model, x, y, step) @ step
    torch.testing.assert_close(found.quadratic.increase, expected, rtol=1e-6, atol=1e-9)
    slopes = gradients(model, x, y)
    torch.testing.assert_close(found.linear.increase, expected + slopes @ step, rtol=1e-6, atol=1e-9)


def test_second_derivatives_at_a_kink_are_those_of_torch() -> None:
    """Where differences jump there is nothing to judge by: zero inputs and biases lie on the kinks of ReLU."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
            nn.init.zeros_(self.one.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    model, x, y = Net().double(), torch.zeros(3, 4).double(), torch.tensor([0, 1, 2])
    found = estimate(Hessian(), Dense(), EmpiricalRisk.snapshot(model, CE, [(x, y)])).curvature.dense()
    plain = nn.Sequential(model.one, nn.ReLU(), model.two)
    exact = estimate(Hessian(), Dense(), EmpiricalRisk.snapshot(plain, CE, [(x, y)])).curvature.dense()
    torch.testing.assert_close(found, exact)


class Own(nn.Linear):
    """A linear layer of another name, whose derivatives are tried."""


def test_where_differences_are_rounding_torch_is_believed() -> None:
    """A sure and wrong model: gradients of 1 and second derivatives of 1e-13."""
    model, x, y = Own(3, 2), torch.rand(12, 3, generator=torch.Generator().manual_seed(0)), torch.ones(12).long()
    model.bias.data = torch.tensor([15.0, -15.0])
    plain = nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    for kind in (torch.float32, torch.float64):
        found, expected = (
            estimate(Hessian(), Dense(), EmpiricalRisk.snapshot(one.to(kind), CE, [(x.to(kind), y)])).curvature.dense()
            for one in (model, plain)
        )
        assert expected.any()
        torch.testing.assert_close(found, expected)


class Detached(nn.Linear):
    """Its gradient is that of no function: where the length is held still, it is held still for both derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs / outputs.norm(dim=1, keepdim=True).detach()


def test_a_gradient_of_no_function_has_no_hessian() -> None:
    torch.manual_seed(0)
    model, x, y = Detached(4, 3).double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    risk = EmpiricalRisk.snapshot(model, CE, [(x, y)])
    for structure in STRUCTURES:
        with pytest.raises(TypeError, match=r"gradient of Detached is that of no function.*Use GGN\(\)"):
            estimate(Hessian(), structure, risk)
        estimate(GGN(), structure, risk)


def test_a_model_of_known_modules_is_not_tried(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert is_plain(model)
    risk = EmpiricalRisk.snapshot(model, CE, [(torch.randn(5, 4), torch.randint(3, (5,)))])
    monkeypatch.setattr("avalanche_curv.core.risk.trust._tried", None)
    for kind in (GGN(), Hessian()):
        for structure in STRUCTURES:
            estimate(kind, structure, risk)


@pytest.mark.parametrize("make", [pruned, hooked, Prototypes])
def test_a_model_that_only_looks_known_is_tried(make) -> None:
    assert not is_plain(make())


class Reader(nn.Module):
    """No layer explains the parameters of attention, nor a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 16), x.view(len(x), 2, 16)], dim=1)
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])


def test_a_shuffling_loader_gives_what_an_ordered_one_gives() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reader()
        data = torch.utils.data.TensorDataset(torch.randn(40, 32), torch.randint(3, (40,)))
    state = torch.get_rng_state()
    found = []
    for shuffle in (False, True):
        loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=shuffle)
        risk = EmpiricalRisk.snapshot(model, CE, loader)
        assert risk.space.size > 1000
        found.append((estimate(GGN(), LowRank(Rank(5)), risk).curvature.values, landscape(GGN(), risk).trace))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=0)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert torch.equal(torch.get_rng_state(), state)


def test_lanczos_products_of_distances_are_right() -> None:
    torch.manual_seed(0)
    model, x, y = Prototypes().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    risk = EmpiricalRisk.snapshot(model, CE, [(x, y)])
    found = landscape(GGN(), risk, k=3, methods=(Lanczos(),))
    assert found.sharpness == pytest.approx(float(torch.linalg.eigvalsh(ggn(model, x))[-1]), rel=1e-4)


def test_a_constant_gradient_has_no_second_derivative_whatever_torch_says() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.randn(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return Straight.apply(self.theta).expand(len(x), 3)

    x, y = torch.randn(2, 1).double(), torch.randn(2, 3).double()
    risk = EmpiricalRisk.snapshot(Constant(), nn.MSELoss(), [(x, y)])
    assert Hessian().operator(risk).matmat(torch.eye(3).double()).abs().max() < 1e-9


def _plain(slope=0.1):
    return nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(slope), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.zeros_(model[0].bias),
        lambda model: model.double(),
        lambda model: model.append(nn.ReLU()),
        lambda model: model[0].register_forward_hook(lambda module, inputs, output: output + 1),
        lambda model: setattr(model[1], "negative_slope", 0.2),
    ],
    ids=["value", "type", "module", "hook", "option"],
)
def test_models_are_the_same_until_something_differs(change):
    model, other = _plain(), _plain()
    other.load_state_dict(model.state_dict())
    assert is_same(model, other.train())
    with torch.no_grad():
        change(other)
    assert not is_same(model, other)
