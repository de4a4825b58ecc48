"""Where a model is sure, curvature is tiny and has its digits all the same; masked classes have none."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import grad, hessian

from avalanche_curv import (
    GGN,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Kronecker,
    NonFiniteCurvatureError,
    estimate,
    example_loss,
    landscape,
)

LOGITS = [
    (30.0, 0.0), (0.0, 30.0), (0.0, 30.0, -5.0), (30.0, 30.0, 0.0), (30.0, -5.0, 0.0, 1.0),
]  # fmt: skip
WEIGHTS = torch.tensor([0.5, 2.0, 1.1, 1.3, 0.1])


def softmax_on_paper(f):
    """p and 1 − p, each as a sum of positive numbers in float64."""
    e = [math.exp(v) for v in f]
    return [v / sum(e) for v in e], [sum(e[:c] + e[c + 1 :]) / sum(e) for c in range(len(e))]


def cross_entropy_on_paper(f, y, weight, smoothing):
    """∇ℓ and ∇²ℓ, entry by entry."""
    (p, q), n = softmax_on_paper(f), len(f)
    w = [1.0] * n if weight is None else [float(v / weight[:n].mean()) for v in weight[:n]]
    mass = [(1 - smoothing) * w[c] * (c == y) + smoothing * w[c] / n for c in range(n)]
    total = sum(mass)
    gradient = [total * p[c] - mass[c] for c in range(n)]
    gradient[y] = -sum(gradient[:y] + gradient[y + 1 :])
    second = [[total * (p[i] * q[i] if i == j else -p[i] * p[j]) for j in range(n)] for i in range(n)]
    return torch.tensor(gradient, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


def binary_on_paper(f, y, positive):
    n = len(f)
    p, q = ([1 / (1 + math.exp(sign * v)) for v in f] for sign in (-1, 1))
    gradient = [-positive[c] * q[c] if y[c] else p[c] for c in range(n)]
    second = [p[c] * q[c] * (positive[c] if y[c] else 1) for c in range(n)]
    return torch.tensor(gradient, dtype=torch.float64) / n, torch.tensor(second, dtype=torch.float64).diag() / n


def assert_all_digits(found, on_paper):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), on_paper, rtol=1e-4, atol=1e-37)  # smaller numbers underflow


def assert_loss(criterion, f, y, gradient, second):
    """The loss in its outputs, by the formulas and by autograd."""
    loss, f, y = example_loss(criterion), torch.tensor([f]), y[None]
    assert_all_digits(loss.gradient(f, y)[0], gradient)
    factor = loss.hessian_factor(f, y).tensor()[0]
    assert_all_digits(factor @ factor.T, second)
    assert_all_digits(grad(lambda v: loss.per_example(v, y)[0])(f)[0], gradient)
    assert_all_digits(hessian(lambda v: loss.per_example(v[None], y)[0])(f[0]), second)


def assert_kinds(criterion, f, y, gradient, second, kinds):
    """A linear layer at x = 1 has the logits as weights, so its curvature is that of the loss in the outputs."""
    model = nn.Linear(1, len(f), bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(f)[:, None])
    risk = EmpiricalRisk.snapshot(model, criterion, [(torch.ones(1, 1), y[None])])
    assert_all_digits(risk.gradient(), gradient)
    for kind, matrix in [(kind, second) for kind in kinds] + [(EmpiricalFisher(), gradient.outer(gradient))]:
        assert_all_digits(estimate(kind, Dense(), risk).curvature.dense(), matrix)
        assert_all_digits(estimate(kind, Diagonal(), risk).curvature.dense(), matrix.diagonal().diag())
    assert_all_digits(estimate(GGN(), Kronecker(), risk).curvature.dense(), second)


@pytest.mark.parametrize(("weight", "smoothing"), [(None, 0.0), (WEIGHTS, 0.0), (None, 0.1), (WEIGHTS, 0.1)])
def test_cross_entropy_keeps_its_digits_for_every_label(weight, smoothing):
    for logits in LOGITS:
        criterion = nn.CrossEntropyLoss(None if weight is None else weight[: len(logits)], label_smoothing=smoothing)
        for y in range(len(logits)):
            assert_loss(criterion, logits, torch.tensor(y), *cross_entropy_on_paper(logits, y, weight, smoothing))


@pytest.mark.parametrize("positive", [None, 3.0])
def test_binary_cross_entropy_keeps_its_digits_for_either_label(positive):
    criterion = nn.BCEWithLogitsLoss(pos_weight=None if positive is None else torch.tensor(positive))
    for logits in LOGITS[:3]:
        for y in itertools.product([0, 1], repeat=len(logits)):
            on_paper = binary_on_paper(logits, y, [positive or 1.0] * len(logits))
            assert_loss(criterion, logits, torch.tensor(y).float(), *on_paper)


@pytest.mark.parametrize("y", [0, 1])
def test_so_do_the_matrices_of_every_kind(y):
    logits = (30.0, 0.0, -2.0)
    kinds = [GGN(), Fisher(), Hessian()]
    on_paper = cross_entropy_on_paper(logits, y, None, 0.0)
    assert_kinds(nn.CrossEntropyLoss(), logits, torch.tensor(y), *on_paper, kinds)
    labels = (y, 1 - y, y)
    on_paper = binary_on_paper(logits, labels, [1.0] * 3)
    assert_kinds(nn.BCEWithLogitsLoss(), logits, torch.tensor(labels).float(), *on_paper, kinds)


@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher()])
def test_a_confident_network_in_single_precision_has_the_curvature_of_one_in_double(kind, net):
    x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        net[2].weight.mul_(60)
        gaps = net(x).topk(2).values.diff(dim=1)[:, 0].neg()
        x, y = (part[(gaps > 15) & (gaps < 35)] for part in (x, net(x).argmax(1)))
    assert len(x) > 3
    copies = (net.to(dtype) for dtype in (torch.float32, torch.float64))
    risks = [EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)]) for model in copies]
    for structure in (Diagonal(), Dense()):
        single, double = (estimate(kind, structure, risk).curvature.dense() for risk in risks)
        torch.testing.assert_close(single.diagonal().double(), double.diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_sampled_gradients_keep_their_digits(logits):
    p, q = softmax_on_paper(logits)
    borders = torch.tensor([0.0, *p]).cumsum(0)
    for y in range(len(logits)):
        middle = ((borders[y] + borders[y + 1]) / 2).expand(1, 1, len(logits))
        label = int((middle[0, 0, 0] >= borders[1:-1]).sum())  # the one drawn, where the interval is too small for y
        drawn = example_loss(nn.CrossEntropyLoss()).sample_gradients(torch.tensor([logits]), torch.tensor([0]), middle)
        expected = torch.tensor([-q[c] if c == label else p[c] for c in range(len(logits))]).double()
        assert_all_digits(drawn[0, :, 0], expected)
    on, off = (torch.full((1, 1, 2), uniform) for uniform in (0.0, 1.0))
    f = torch.tensor([[30.0, -30.0]])
    low, high = 1 / (1 + math.exp(30)), 1 / (1 + math.exp(-30))
    binary = example_loss(nn.BCEWithLogitsLoss(reduction="sum"))
    assert_all_digits(binary.sample_gradients(f, f, on)[0, :, 0], torch.tensor([-low, -high]).double())
    assert_all_digits(binary.sample_gradients(f, f, off)[0, :, 0], torch.tensor([high, low]).double())


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_values_and_both_derivatives_of_the_loss_keep_their_digits_under_autograd(size):
    exact = math.log1p(2 * math.exp(-size))
    loss = example_loss(nn.CrossEntropyLoss())

    def of(f, y):
        return loss.per_example(f[None], torch.tensor([y]))[0]

    f = torch.tensor([size, 0.0, 0.0])
    assert of(f, 0).item() == pytest.approx(exact, rel=1e-6)
    assert of(f, 1).item() == pytest.approx(size + exact, rel=1e-6)
    for y in (0, 1):
        assert_all_digits(grad(of)(f, y), loss.gradient(f[None], torch.tensor([y]))[0].double())
        factor = loss.hessian_factor(f[None], torch.tensor([y])).tensor()[0].double()
        assert_all_digits(hessian(of)(f, y), factor @ factor.T)
    binary = example_loss(nn.BCEWithLogitsLoss())
    for f, y in itertools.product([size, -size], [0.0, 1.0]):
        value = binary.per_example(torch.tensor([[f]]), torch.tensor([[y]]))
        assert value.item() == pytest.approx(max(f, 0) - y * f + math.log1p(math.exp(-size)), rel=1e-6)


class Masked(nn.Module):
    """Logits of which some are −inf, as of the classes of other tasks."""

    def __init__(self, hidden, how):
        super().__init__()
        self.body, self.hidden, self.how = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)), hidden, how
        self.register_buffer("mask", torch.tensor([c in hidden for c in range(4)]))

    def forward(self, x):
        f = self.body(x)
        if self.how == "fill":
            return f.masked_fill(self.mask, -math.inf)
        if self.how == "where":
            return torch.where(self.mask, -math.inf, f)
        return f + torch.where(self.mask, -math.inf, 0.0)


@pytest.mark.parametrize(("how", "hidden"), [("fill", (0,)), ("where", (1, 2)), ("add", (3,))])
def test_masked_logits_curve_like_a_model_without_their_classes(how, hidden, make_model, close):
    masked = make_model(lambda: Masked(hidden, how))
    seen = [c for c in range(4) if c not in hidden]
    plain = make_model(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, len(seen))))
    with torch.no_grad():
        for name, value in masked.body.named_parameters():
            plain.get_parameter(name).copy_(value[seen] if name.startswith("2") else value)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(6) % len(seen)
    here = EmpiricalRisk.snapshot(masked, nn.CrossEntropyLoss(), [(x, torch.tensor(seen)[y])])
    there = EmpiricalRisk.snapshot(plain, nn.CrossEntropyLoss(), [(x, y)])
    assert here.value() == pytest.approx(there.value(), rel=1e-12)
    rows = torch.arange(45).split([20, 5, 20]) + tuple(torch.arange(45, 49)[:, None])
    kept = torch.cat([rows[0], rows[1], rows[2].view(4, 5)[seen].flatten(), torch.arange(45, 49)[seen]])
    for kind in (GGN(), Fisher(samples=3, seed=0), EmpiricalFisher(), Hessian()):
        found = estimate(kind, Dense(), here).curvature.dense()
        assert found.isfinite().all()
        if kind == Fisher(samples=3, seed=0):
            continue  # other draws
        expected = torch.zeros_like(found)
        expected[kept[:, None], kept] = estimate(kind, Dense(), there).curvature.dense()
        close(found, expected)
        assert landscape(kind, here, k=1).trace == pytest.approx(expected.trace().item(), rel=1e-9)
        for structure in (Diagonal(), Kronecker()):
            if kind != Hessian() or structure == Diagonal():
                assert estimate(kind, structure, here).curvature.dense().isfinite().all()


def test_a_masked_class_that_the_cumulated_probabilities_leave_a_gap_for_is_not_drawn():
    f = torch.cat([torch.randn(1, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([[-math.inf]])], 1)
    drawn = example_loss(nn.CrossEntropyLoss()).sample_gradients(f, torch.tensor([0]), torch.ones(1, 1, 51))
    assert drawn[0, 50, 0] == 0


@pytest.mark.parametrize(
    ("criterion", "targets"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 0])),  # the label itself is masked
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([1, 1])),
        (nn.BCEWithLogitsLoss(), torch.ones(2, 4)),
        (nn.MSELoss(), torch.ones(2, 4)),
    ],
)
def test_a_loss_that_masked_logits_make_infinite_is_refused(criterion, targets, make_model):
    model = make_model(lambda: Masked((0,), "fill")).float()
    risk = EmpiricalRisk.snapshot(model, criterion, [(torch.ones(2, 4), targets)])
    for attempt in (lambda: estimate(GGN(), Dense(), risk), lambda: landscape(GGN(), risk)):
        with pytest.raises(NonFiniteCurvatureError, match="NaN or infinity, so the model, its loss or its inputs do"):
            attempt()


def test_labels_of_eight_bits_are_classes(net, close):
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
    plain, small = (EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [(x, t)]) for t in (y, y.byte()))
    assert small.value() == plain.value()
    for kind in (GGN(), EmpiricalFisher(), Hessian()):
        for structure in (Dense(), Diagonal()):
            close(*(estimate(kind, structure, risk).curvature.dense() for risk in (small, plain)))
