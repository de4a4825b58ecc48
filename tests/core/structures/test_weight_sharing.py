"""Kronecker factors of layers that use one weight at several positions, in both readings."""

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

from avalanche_curv import EKFAC, GGN, Dense, EmpiricalFisher, EmpiricalRisk, Expand, Kronecker, Reduce, estimate

EXAMPLES, STEPS = 5, 3


class Conv1D(nn.Module):
    """The linear layer of GPT-2: x W + b with W [in, out]."""

    def __init__(self, out, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Tagger(nn.Module):
    """A deep linear network with outputs for each position."""

    def __init__(self, middle=nn.Linear(3, 3)):  # noqa: B008  it is copied
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(2, 3), middle, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.middle(self.body(x))).flatten(1)


class Pooled(Tagger):
    """The mean over positions, between two of the layers."""

    def forward(self, x):
        return self.head(self.middle(self.body(x)).mean(1))


class Summed(Tagger):
    def forward(self, x):
        return self.head(self.middle(self.body(x))).sum(1)


class Image(nn.Module):
    """A convolution and the mean over its pixels."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 2, (1, 2)), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.body(x[:, None]).mean((2, 3)))


MODELS = {
    "tagger": Tagger, "pooled": Pooled, "summed": Summed, "image": Image,
    "transposed tagger": lambda: Tagger(Conv1D(3, 3)), "transposed pooled": lambda: Pooled(Conv1D(3, 3)),
}  # fmt: skip
EXACT = [
    ("tagger", Expand(), True), ("tagger", Reduce(), False), ("transposed tagger", Expand(), True),
    ("pooled", Reduce(), True), ("pooled", Expand(), False), ("transposed pooled", Reduce(), True),
    ("summed", Reduce(), True), ("image", Reduce(), True), ("image", Expand(), False),
]  # fmt: skip


@pytest.fixture
def made(make_model):
    """made(name): a model and a risk of squared errors on random sequences."""

    def make(name):
        model = make_model(MODELS[name])
        inputs = torch.randn(EXAMPLES, STEPS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        targets = torch.zeros_like(model(inputs)).detach()
        return model, EmpiricalRisk.snapshot(model, nn.MSELoss(), list(zip(inputs.split(3), targets.split(3))))

    return make


def jacobians(model, risk):
    """[N, C, P], an output at a time."""
    found = []
    for x in torch.cat([inputs for inputs, _ in risk]):
        outputs = model(x[None]).reshape(-1)
        parts = [torch.autograd.grad(output, [*model.parameters()], retain_graph=True) for output in outputs]
        found.append(torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in parts]))
    return torch.stack(found)


def blocks(model, matrix):
    """`matrix` without what lies between two layers."""
    owners = torch.cat([
        torch.full((p.numel(),), number)
        for number, module in enumerate(model.children()) for p in module.parameters()
    ])
    return torch.where(owners[:, None] == owners, matrix, 0.0)


@pytest.mark.parametrize(("name", "sharing", "is_exact"), EXACT)
def test_each_reading_is_exact_for_deep_linear_networks_of_its_own_setting(name, sharing, is_exact, made, close):
    """Propositions 1 and 2 of Eschenhagen et al. (2023): the blocks of layers of (1/N) Σ Jᵀ (2/C) J."""
    model, risk = made(name)
    j = jacobians(model, risk)
    exact = blocks(model, torch.einsum("ncp,ncq->pq", j, j) * 2 / j.shape[1] / EXAMPLES)
    found = estimate(GGN(), Kronecker(sharing=sharing), risk).curvature.dense()
    corrected = estimate(GGN(), EKFAC(sharing=sharing), risk).curvature.dense()
    if is_exact:
        close(found, exact)
        close(corrected, exact)
    else:
        assert (found - exact).norm() > 1e-2 * exact.norm()
        assert (corrected - exact).norm() <= (found - exact).norm()
    assert corrected.trace().item() == pytest.approx(exact.trace().item())


@pytest.mark.parametrize("name", ["tagger", "transposed pooled", "image"])
def test_factors_of_the_second_reading_are_means_of_inputs_and_sums_of_sensitivities(name, made, close):
    model, risk = made(name)
    seen = {}
    layer = model.body if name == "image" else model.middle
    layer.register_forward_hook(lambda _, args, out: seen.update(a=args[0].detach(), z=out))
    a_sum, g_sum = 0, 0
    for inputs, targets in risk:
        for x, y in zip(inputs, targets):
            loss = nn.functional.mse_loss(model(x[None])[0], y)
            (b,) = torch.autograd.grad(loss, seen["z"])
            if name == "image":
                a, b = unfold(seen["a"], (1, 2))[0].mean(1), b[0].sum((1, 2))
            else:
                a, b = seen["a"][0].mean(0), b[0].sum(0)
            a = torch.cat([a, torch.ones(1).double()])
            a_sum, g_sum = a_sum + torch.outer(a, a), g_sum + torch.outer(b, b)
    found = estimate(EmpiricalFisher(), Kronecker(sharing=Reduce()), risk).curvature.layers
    place = found[0 if name == "image" else 1]
    close(place.terms[0].a, a_sum / EXAMPLES)
    close(place.terms[0].g, g_sum / EXAMPLES)


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC()], ids=str)
def test_a_transposed_weight_has_the_curvature_of_its_transpose(structure, made, make_model, close):
    """Products, sums, growth and entries of a layer x W + b are those of a linear layer with Wᵀ."""
    model, risk = made("transposed tagger")
    plain = make_model(Tagger)
    state = model.state_dict()
    plain.load_state_dict({**state, "middle.weight": state["middle.weight"].T})
    other = EmpiricalRisk.snapshot(plain, nn.MSELoss(), risk.batches)
    one, two = (estimate(GGN(), structure, r).curvature for r in (risk, other))
    v = torch.linspace(-1, 1, one.size).double()

    def turned(vector):
        parts = dict(zip(risk.space.names, risk.space.split(vector)))
        parts["middle.weight"] = parts["middle.weight"].T
        return risk.space.flatten([*parts.values()])

    close(turned(one.product(v)), two.product(turned(v)))
    close(turned(one.plus(one).product(v)), 2 * two.product(turned(v)))
    assert one.layers[1].transposed
    assert one.plus(one).layers[1].transposed
    close(one.dense() @ v, one.product(v))
    shapes = {**dict(zip(risk.space.names, risk.space.shapes)), "middle.weight": (3, 5), "middle.bias": (5,)}
    outer = type(risk.space)(risk.space.names, tuple(torch.Size(shape) for shape in shapes.values()))
    where = outer.positions(risk.space)
    grown = one.embedded(risk.space, outer).dense()
    close(grown[where[:, None], where], one.dense())
    assert float(grown.trace()) == pytest.approx(one.trace())


def test_one_position_is_the_same_in_both_readings(make_model, close):
    model = make_model(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, torch.tensor([0, 1, 1, 0]))])
    one, two = (estimate(GGN(), Kronecker(sharing=sharing), risk).curvature for sharing in (Expand(), Reduce()))
    close(one.dense(), two.dense())


@pytest.mark.parametrize("structure", [Kronecker, EKFAC])
def test_another_reading_is_refused(structure):
    with pytest.raises(TypeError, match=r"sharing must be a WeightSharing; got .*Expand\(\) or Reduce\(\)"):
        structure(sharing="reduce")


def test_the_exact_diagonal_stays_outside_of_layers(made, close):
    """Of a norm layer between them, in both readings."""
    model, risk = made("tagger")
    normed = nn.Sequential(model.body, nn.LayerNorm(3).double(), model.head, nn.Flatten())
    other = EmpiricalRisk.snapshot(normed, nn.MSELoss(), risk.batches)
    exact = estimate(GGN(), Dense(), other).curvature.dense().diagonal()
    for sharing in (Expand(), Reduce()):
        diagonal = estimate(GGN(), Kronecker(sharing=sharing), other).curvature.diagonal
        kept = diagonal != 0
        assert int(kept.sum()) == 6
        close(diagonal[kept], exact[kept])
