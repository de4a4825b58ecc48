"""Every criterion in its outputs: value, slope, curvature and draws as torch's own criterion of one example says."""

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from avalanche_curv import (
    GGN,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    LossFunction,
    estimate,
    example_loss,
)
from avalanche_curv.core.losses.factor import as_factor
from avalanche_curv.core.nested import Nested, index, split

N = 4
GENERATOR = torch.Generator().manual_seed(0)
W = torch.tensor([0.5, 2.0, 1.1], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1])
TOKENS = torch.tensor([[0, 2, 1, 1, -100], [2, 2, -100, -100, 0], [-100] * 5, [1, 0, 0, 2, 1]])


def real(*shape):
    return torch.randn(N, *shape, generator=GENERATOR, dtype=torch.float64)


def unit(*shape):
    return torch.rand(N, *shape, generator=GENERATOR, dtype=torch.float64)


def yes(*shape):
    return (unit(*shape) > 0.5).double()


def counts(*shape):
    return (4 * unit(*shape)).round()


def heads(f, y):
    """A class with its logits, and a box that counts where there is one."""
    off = F.huber_loss(f[:, 3:], y["box"][0], reduction="none") * y["box"][1][:, None]
    return F.cross_entropy(f[:, :3], y["class"]) + 2 * off.mean()


def heads_in_turn(f, y):
    """Without a rule to do all examples at once."""
    return sum(heads(one, y) if float(one.detach().sum()) < 1e9 else one.sum() for one in [f])


def quartic(f, y):
    return (f - y).pow(4).mean()


def data_dependent(f, y):
    """A loss that `vmap` cannot pass over all examples at once."""
    signs = [float(r.detach().sum()) > 0 for r in f - y]
    return sum(r.square().sum() if sign else r.exp().sum() for r, sign in zip(f - y, signs))


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.inner = nn.CrossEntropyLoss(reduction="sum")

    def forward(self, f, y):
        return self.inner(f * self.log.exp(), y)


@dataclass
class Case:
    """A criterion, the outputs of N examples, their targets; the loss of one example by another way than torch's
    criterion where that has no such value or no second derivative."""

    criterion: Any
    outputs: Tensor
    targets: Nested
    one: Any = None


CE = nn.CrossEntropyLoss


def relative(f, y):
    return F.cross_entropy(f, y, W / W.mean(), reduction="sum", ignore_index=1)


def no_token(criterion):
    """The loss of one example, with 0 where no token counts."""
    return lambda f, y: criterion(f, y) if (y != criterion.ignore_index).any() else 0 * f.sum()


def margin(f, y, p=1, weight=None):
    over = [max(0.0, 1 - f[0, y[0]] + f[0, c]) ** p if c != y[0] else 0.0 * f[0, c] for c in range(3)]
    return sum(over) / 3 * (1 if weight is None else weight[y[0]])


def label_margin(f, y):
    own = [int(c) for c in y[0] if int(c) >= 0]  # those before the first −1
    pairs = [(j, c) for j in own for c in range(3) if c not in own]
    return sum(((1 - f[0, j] + f[0, c]).clamp_min(0) for j, c in pairs), 0 * f.sum()) / 3


def tokens(**options):
    criterion = CE(**options)
    return Case(criterion, real(3, 5), TOKENS, no_token(criterion))


CASES = {
    "classes": Case(CE(), 2 * real(3), LABELS),
    "classes, summed": Case(CE(reduction="sum"), real(3), LABELS),
    "classes, bytes": Case(
        CE(label_smoothing=0.2), real(3), LABELS.byte(), lambda f, y: F.cross_entropy(f, y.long(), label_smoothing=0.2)
    ),
    "classes, ignored": Case(CE(ignore_index=2), real(3), LABELS, no_token(CE(ignore_index=2))),
    "classes, weighted and ignored": Case(CE(W, ignore_index=1), real(3), LABELS, relative),
    "classes, weighted and smoothed": Case(
        CE(W, label_smoothing=0.3), real(3), LABELS,
        lambda f, y: F.cross_entropy(f, y, W / W.mean(), reduction="sum", label_smoothing=0.3),
    ),
    "probabilities": Case(CE(), real(3), unit(3).softmax(1)),
    "probabilities, smoothed and weighted": Case(CE(W, label_smoothing=0.3), real(3), unit(3).softmax(1)),
    "probabilities of tokens, weighted": Case(CE(W), real(3, 5), unit(3, 5).softmax(1)),
    "probabilities of tokens, summed": Case(CE(reduction="sum"), real(3, 2, 2), unit(3, 2, 2).softmax(1)),
    "tokens": tokens(),
    "tokens, summed": tokens(reduction="sum"),
    "tokens, weighted": tokens(weight=W),
    "tokens, weighted and smoothed": tokens(weight=W, label_smoothing=0.3),
    "tokens, smoothed and summed": tokens(weight=W, label_smoothing=0.3, reduction="sum"),
    "pixels": Case(CE(), real(3, 2, 3), torch.randint(3, (N, 2, 3), generator=GENERATOR)),
    "one pixel, weighted": Case(CE(W), real(3, 1, 1), LABELS[:, None, None]),
    "nll": Case(nn.NLLLoss(), real(3).log_softmax(1), LABELS, CE()),
    "nll of tokens": Case(nn.NLLLoss(W), real(3, 5).log_softmax(1), TOKENS, no_token(CE(W))),
    "kl": Case(nn.KLDivLoss(reduction="batchmean"), real(3).log_softmax(1), unit(3).softmax(1)),
    "kl, mean": Case(nn.KLDivLoss(), real(4, 3).log_softmax(2), unit(4, 3).softmax(2)),
    "kl of logarithms": Case(
        nn.KLDivLoss(reduction="sum", log_target=True), real(3, 4).log_softmax(1), real(3, 4).log_softmax(1)
    ),
    "squares": Case(nn.MSELoss(), real(2, 3), real(2, 3)),
    "absolute": Case(nn.L1Loss(), real(3), real(3)),
    "absolute, summed": Case(nn.L1Loss(reduction="sum"), real(), real()),
    "smooth": Case(nn.SmoothL1Loss(beta=0.7), real(3), real(3)),
    "smooth, not at all": Case(nn.SmoothL1Loss(beta=0.0), real(3), real(3)),
    "huber": Case(nn.HuberLoss(delta=0.6, reduction="sum"), real(3), real(3)),
    "poisson": Case(nn.PoissonNLLLoss(full=True), real(3), counts(3)),
    "poisson of rates": Case(nn.PoissonNLLLoss(log_input=False, eps=0.1), unit(3) + 0.2, counts(3)),
    "gaussian": Case(nn.GaussianNLLLoss(full=True), real(3), (real(3), unit(3) + 0.1),
                     lambda f, y: F.gaussian_nll_loss(f, *y, full=True)),
    "gaussian, one variance": Case(nn.GaussianNLLLoss(reduction="sum"), real(2, 2), [real(2, 2), unit(2) + 0.1],
                                   lambda f, y: F.gaussian_nll_loss(f, *y, reduction="sum")),
    "torch's function of three": Case(F.gaussian_nll_loss, real(), (real(), unit()),
                                      lambda f, y: F.gaussian_nll_loss(f, *y)),
    "binary": Case(nn.BCEWithLogitsLoss(), real(3), unit(3)),
    "binary, weighted": Case(nn.BCEWithLogitsLoss(W, pos_weight=2 * W), real(3), yes(3)),
    "bernoulli": Case(nn.BCELoss(), 0.1 + 0.8 * unit(3), unit(3)),
    "bernoulli, weighted": Case(nn.BCELoss(W, reduction="sum"), 0.1 + 0.8 * unit(3), yes(3)),
    "signs": Case(nn.SoftMarginLoss(), real(3), 2 * yes(3) - 1),
    "labels": Case(nn.MultiLabelSoftMarginLoss(), real(3), yes(3)),
    "labels, weighted": Case(nn.MultiLabelSoftMarginLoss(W), real(3), yes(3)),
    "labels, summed": Case(nn.MultiLabelSoftMarginLoss(reduction="sum"), real(3), yes(3)),
    "margins": Case(nn.MultiMarginLoss(), real(3), LABELS, margin),
    "squared margins": Case(nn.MultiMarginLoss(p=2, weight=W), real(3), LABELS, lambda f, y: margin(f, y, 2, W)),
    "margins of labels": Case(
        nn.MultiLabelMarginLoss(), real(3), torch.tensor([[0, -1, 1], [2, 1, -1], [-1, 0, 0], [1, 0, 2]]),
        lambda f, y: label_margin(f, y if -1 not in y[0] else y[:, : y[0].tolist().index(-1)]),
    ),
    "function": Case(quartic, real(3), real(3)),
    "function of two axes": Case(quartic, real(2, 3), real(2, 3)),
    "function of a nesting": Case(heads, real(5), {"class": LABELS, "box": (real(2), yes(), None)}),
    "function of a nesting, one after the other": Case(
        heads_in_turn, real(5), {"class": LABELS, "box": (real(2), yes(), None)}
    ),
    "function, one after the other": Case(data_dependent, real(3), real(3)),
    "torch's function": Case(F.cross_entropy, real(3), LABELS),
    "torch's function of tokens": Case(F.cross_entropy, real(3, 5), TOKENS, no_token(CE())),
    "module with a parameter": Case(Temperature(), real(3), LABELS),
    "hinge": Case(nn.HingeEmbeddingLoss(), real(3), 2 * yes(3) - 1),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def fitted(case):
    return example_loss(case.criterion).fitted(lambda: (case.outputs, case.targets))


def one_by_one(case):
    """ℓ, ∇ℓ and ∇²ℓ of each example in its flat outputs, by autograd."""
    formula, found = case.one or case.criterion, []
    for i in range(N):
        f, y = index((case.outputs, case.targets), slice(i, i + 1))

        def loss(v, f=f, y=y):
            return formula(v.view_as(f), y).sum()

        flat = f.reshape(-1).clone().requires_grad_()
        value = loss(flat)
        (slope,) = torch.autograd.grad(value, flat)
        found.append((value.detach(), slope, hessian(loss, flat.detach())))
    return [torch.stack(part) for part in zip(*found)]


def softmaxed(case):
    """KLDivLoss is linear in log-probabilities; its curvature is that through another log_softmax."""
    if not isinstance(case.criterion, nn.KLDivLoss):
        return case
    axis = 2 if case.outputs.shape[1:] == (4, 3) else 1
    return Case(None, case.outputs, case.targets, lambda f, y: case.criterion(f.log_softmax(axis), y))


def test_value_slope_and_curvature_are_those_of_one_example_after_the_other(case, close):
    loss, flat = fitted(case), case.outputs.reshape(N, -1)
    loss.check(case.outputs, case.targets)
    values, slopes, curvatures = one_by_one(softmaxed(case))
    close(loss.per_example(flat, case.targets), values)
    close(loss.gradient(flat, case.targets), slopes)
    factor = as_factor(loss.hessian_factor(flat, case.targets))
    close(factor.tensor() @ factor.tensor().mT, curvatures)
    free = flat.clone().requires_grad_()
    close(torch.autograd.grad(loss.per_example(free, case.targets).sum(), free)[0], slopes)


def test_a_factor_acts_and_splits_as_its_columns(case, close):
    loss, flat = fitted(case), case.outputs.reshape(N, -1)
    for of in (loss.hessian_factor, loss.fisher_factor):
        try:
            factor = as_factor(of(flat, case.targets))
        except ValueError:  # no Fisher
            continue
        whole = torch.cat([*factor.columns(10**6)], dim=2)
        assert whole.shape == (N, flat.shape[1], factor.count)
        close(torch.cat([*factor.columns(2)], dim=2), whole)
        close(factor.tensor(), whole)
        u = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        close(factor.times(u), torch.einsum("ncr,nr->nc", whole, torch.einsum("ncr,nc->nr", whole, u)))
        close(torch.cat([part.tensor() for part in factor.split(3)]), whole)
        close(torch.cat([part.times(v) for part, v in zip(factor.split(3), u.split(3))]), factor.times(u))
        weights = torch.tensor([0.5, 2.0, 1.0, 3.0]).double()
        scaled = factor.scaled(weights).tensor()
        close(scaled @ scaled.mT, weights[:, None, None] ** 2 * (whole @ whole.mT))
        assert factor.tensor_bytes(N) <= 8 * whole.numel()


LIKELIHOODS = {
    name: case for name, case in CASES.items()
    if not any(word in name for word in ("weighted", "margins", "function", "module", "hinge", "smooth", "huber"))
    and name not in ("nll of tokens", "labels, summed")
} | {"classes, smoothed": Case(CE(label_smoothing=0.2), real(3), LABELS)}  # fmt: skip


def expected_square(case, i):
    """E[g gᵀ] of one example, the mean over outputs or tokens taken outside: a sum over targets in closed form."""
    (f, y), criterion = index((case.outputs, case.targets), i), case.criterion
    flat = f.reshape(-1)
    scale = 1 / len(flat) if getattr(criterion, "reduction", "mean") == "mean" else 1.0
    diagonals = {
        nn.MSELoss: lambda: 2 * torch.ones_like(flat), nn.L1Loss: lambda: torch.ones_like(flat),
        nn.BCEWithLogitsLoss: lambda: flat.sigmoid() * (1 - flat.sigmoid()),
        nn.MultiLabelSoftMarginLoss: lambda: flat.sigmoid() * (1 - flat.sigmoid()),
        nn.SoftMarginLoss: lambda: flat.sigmoid() * (1 - flat.sigmoid()),
        nn.BCELoss: lambda: 1 / (flat * (1 - flat)),
        nn.GaussianNLLLoss: lambda: 1 / (y[1][..., None] if y[1].ndim < f.ndim else y[1]).expand_as(f).reshape(-1),
        nn.PoissonNLLLoss: lambda: poisson(flat, criterion),
        nn.SmoothL1Loss: lambda: torch.ones_like(flat),
    }  # fmt: skip
    if type(criterion) in diagonals:
        return (scale * diagonals[type(criterion)]()).diag()
    axis = 1 if f.shape == (4, 3) and isinstance(criterion, nn.KLDivLoss) else 0
    apart = f.movedim(axis, -1).reshape(-1, f.shape[axis])
    places = torch.arange(len(flat)).view(f.shape).movedim(axis, -1).reshape(apart.shape)
    if isinstance(criterion, nn.KLDivLoss):
        given = y.exp() if criterion.log_target else y
        weight = scale * given.movedim(axis, -1).reshape(apart.shape).sum(1)
    elif y.is_floating_point():
        weight = torch.full((len(apart),), 1.0 if criterion.reduction == "sum" else 1 / len(apart)).double()
    else:
        counted = (y.long() != getattr(criterion, "ignore_index", -100)).reshape(-1).double()
        mean = getattr(criterion, "reduction", "mean") == "mean"
        weight = counted / (counted.sum().clamp_min(1) if mean else 1.0)
    total = torch.zeros(len(flat), len(flat)).double()
    for logits, place, w in zip(apart, places, weight):
        p, eye = logits.softmax(0), torch.eye(len(logits)).double()
        total[place[:, None], place] = w * sum(p[c] * (p - eye[c]).outer(p - eye[c]) for c in range(len(p)))
    return total


def poisson(flat, criterion):
    rate = flat.exp() if criterion.log_input else flat
    counts = torch.arange(80).double()
    mass = (counts * rate[:, None].log() - rate[:, None] - torch.lgamma(counts + 1)).exp()
    slopes = rate[:, None] - counts if criterion.log_input else 1 - counts / (flat[:, None] + criterion.eps)
    return (mass * slopes.square()).sum(1)


@pytest.mark.parametrize("case", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_the_fisher_is_the_expectation_over_targets_of_the_model(case, close):
    loss, flat = fitted(case), case.outputs.reshape(N, -1)
    loss.check_likelihood()
    expected = torch.stack([expected_square(case, i) for i in range(N)])
    factor = as_factor(loss.fisher_factor(flat, case.targets)).tensor()
    close(factor @ factor.mT, expected)
    draws, width = 8_000, loss.draws(flat, case.targets)
    uniform = torch.rand(N, draws, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = loss.sample_gradients(flat, case.targets, uniform)
    spread = expected.diagonal(dim1=1, dim2=2).sqrt()
    biased = getattr(case.criterion, "log_input", True) is False  # torch's ε beside the rate
    assert biased or (g.mean(2).abs() <= 5 * spread / draws**0.5 + 1e-9).all()
    products = g[:, :, None] * g[:, None]
    error = products.std(3) / draws**0.5
    assert ((products.mean(3) - expected).abs() <= 6 * error + 1e-9).all()


@pytest.mark.parametrize("name", [name for name in CASES if name not in {*LIKELIHOODS, "smooth, not at all"}])
def test_the_fisher_of_what_is_no_likelihood_is_refused_alone(name):
    case = CASES[name]
    if name in ("classes, bytes", "labels, summed") or name.startswith("torch's"):
        return
    with pytest.raises(ValueError, match=r"Fisher information is not defined .*Use GGN|sample=lambda outputs, uniform"):
        fitted(case).check_likelihood()


LAST = {
    "nll": nn.LogSoftmax(1), "nll of tokens": nn.LogSoftmax(1), "kl": nn.LogSoftmax(1), "kl, mean": nn.LogSoftmax(2),
    "kl of logarithms": nn.LogSoftmax(1), "poisson of rates": nn.Softplus(), "bernoulli": nn.Sigmoid(),
    "bernoulli, weighted": nn.Sigmoid(),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_curvature_of_a_network_is_that_of_the_loop(name, make_model, close):
    known, shape = CASES[name], CASES[name].outputs.shape[1:]
    width = math.prod(shape)
    ends = nn.Unflatten(1, shape) if shape else nn.Flatten(0), LAST.get(name, nn.Identity())
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, width), *ends))
    inputs = torch.randn(N, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        case = Case(known.criterion, model(inputs), known.targets, known.one)
    values, slopes, curvatures = one_by_one(softmaxed(case))
    batches = split((inputs, case.targets), 3)
    risk = EmpiricalRisk.snapshot(model, case.criterion, batches)
    jacobians = Jacobians(risk).all
    assert risk.value() == pytest.approx(values.mean().item(), rel=1e-10)
    close(risk.gradient(), torch.einsum("nkp,nk->p", jacobians, slopes) / N)
    matrices = {GGN(): curvatures, EmpiricalFisher(): slopes[:, :, None] * slopes[:, None]}
    if name in LIKELIHOODS:
        matrices[Fisher()] = torch.stack([expected_square(case, i) for i in range(N)])
    for kind, inner in matrices.items():
        expected = torch.einsum("nkp,nkl,nlq->pq", jacobians, inner, jacobians) / N
        close(estimate(kind, Dense(), risk).curvature.dense(), expected)
        close(estimate(kind, Diagonal(), risk).curvature.dense(), expected.diagonal().diag())
        close(kind.operator(risk).matmat(torch.eye(risk.space.size).double()), expected)
    if name in LIKELIHOODS:
        kind = Fisher(samples=2, seed=0)
        whole = estimate(kind, Dense(), risk).curvature.dense()
        close(estimate(kind, Diagonal(), risk).curvature.dense(), whole.diagonal().diag())


class Jacobians:
    """∂f/∂θ of each example, one output after the other."""

    def __init__(self, risk) -> None:
        self.all = torch.stack([self._one(risk, x) for batch, _ in risk for x in batch.split(1)])

    def _one(self, risk, x):
        with torch.enable_grad():
            outputs = risk.outputs(x)[0]
        rows = [torch.autograd.grad(f, risk.parameters, retain_graph=True) for f in outputs]
        return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("options", [{}, {"full": True, "reduction": "sum"}], ids=["mean", "sum"])
def test_variances_that_a_model_predicts_are_taken_from_its_outputs(options, close):
    """GaussianNLLLoss of means and variances [N, 2, ...] or [N, 2 d1, ...], the last variance below ε: against torch
    after each other, and the Fisher against its closed form and against draws."""
    criterion, y = nn.GaussianNLLLoss(eps=0.05, **options), real(2, 3)
    f, v = real(2, 3), unit(2, 3) + 0.1
    v[0, 0, 0] = 0.01

    def torchs(both, y):
        return criterion(both[:, 0], y, both[:, 1])

    known = Case(torchs, torch.stack([f, v], 1), y)
    loss = example_loss(criterion).fitted(lambda: (known.outputs, y))
    loss.check(known.outputs, y)
    loss.check(torch.cat([f, v], 1), y)
    flat = known.outputs.reshape(N, -1)
    close(torch.cat([f, v], 1).reshape(N, -1), flat)
    values, slopes, _ = one_by_one(known)
    close(loss.per_example(flat, y), values)
    close(loss.gradient(flat, y), slopes)
    free = flat.clone().requires_grad_()
    close(torch.autograd.grad(loss.per_example(free, y).sum(), free)[0], slopes)
    with pytest.raises(ValueError, match=r"not convex in variances that the model predicts.* Use Fisher\(\)"):
        loss.hessian_factor(flat, y)
    loss.check_likelihood()
    scale, own = 1.0 if options else 1 / 6, v.clamp_min(0.05).reshape(N, -1)
    expected = scale * torch.cat([1 / own, 0.5 / own**2], 1)
    close(as_factor(loss.fisher_factor(flat, y)).tensor(), expected.sqrt().diag_embed())
    uniform = torch.rand(N, 20_000, loss.draws(flat, y), generator=torch.Generator().manual_seed(2)).double()
    g = loss.sample_gradients(flat, y, uniform)
    products = g[:, :, None] * g[:, None]
    assert ((products.mean(3) - expected.diag_embed()).abs() <= 6 * products.std(3) / 20_000**0.5 + 1e-9).all()


GAUSSIAN = nn.GaussianNLLLoss()


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (real(3), real(2, 3)), (real(3), (real(3), unit(2))), (real(3), (real(3), -unit(3))), (real(3), (real(3),)),
        (real(3), real(3)), (real(2, 3), real(3)), (torch.cat([real(3), -unit(3)], 1), real(3)),
        (real(3), {"target": real(3), "var": unit(3)}),
    ],
)  # fmt: skip
def test_variances_that_stand_nowhere_are_asked_for(outputs, targets):
    loss = example_loss(GAUSSIAN).fitted(lambda: (outputs, targets))
    with pytest.raises(ValueError, match=r"Got outputs .* and targets .*\(x, \(target, var\)\), and join .*forward="):
        loss.check(outputs, targets)


@pytest.mark.parametrize("name", ["classes", "nll", "kl", "squares", "binary", "signs"])
def test_a_criterion_of_one_tensor_says_so_of_a_nesting(name):
    loss, outputs = example_loss(CASES[name].criterion), CASES[name].outputs
    with pytest.raises(ValueError, match=r"takes one tensor of targets; got \(float64 \(4, .* Give a function of all"):
        loss.check(outputs, (real(3), real(2)))


def test_ignored_tokens_are_as_if_they_were_not_there(close):
    f, y = real(3, 5), torch.tensor([[0, 2, -100, 1, -100]]).expand(N, -1)
    kept = y[0] >= 0
    for options in ({}, {"reduction": "sum"}, {"weight": W, "label_smoothing": 0.2}):
        loss, K = example_loss(CE(**options)), f[:, :, kept].reshape(N, -1)
        flat, fewer = f.reshape(N, -1), y[:, kept]
        close(loss.per_example(flat, y), loss.per_example(K, fewer))
        slopes = loss.gradient(flat, y).view_as(f)
        close(slopes[:, :, kept].reshape(N, -1), loss.gradient(K, fewer))
        assert slopes[:, :, ~kept].abs().max() == 0
        u = real(3, 5)
        curved = loss.hessian_factor(flat, y).times(u.reshape(N, -1)).view_as(f)
        close(curved[:, :, kept].reshape(N, -1), loss.hessian_factor(K, fewer).times(u[:, :, kept].reshape(N, -1)))
        assert curved[:, :, ~kept].abs().max() == 0


class Transposed(nn.Module):
    """Classes on the second axis."""

    def forward(self, x):
        return x.transpose(1, 2)


def contrastive(f, y):
    return (f @ f.T).logsumexp(1).mean()


def standardised(f, y):
    return ((f - f.mean(0)) / (f.std(0, unbiased=False) + 1) - y).square().mean()


@pytest.mark.parametrize("criterion", [contrastive, standardised, lambda f, y: F.cross_entropy(f, y.argmax(1), W)])
def test_a_criterion_that_mixes_examples_is_refused_by_name(criterion):
    with pytest.raises(ValueError, match=rf"{criterion.__name__} mixes the examples of a batch: for 4 .*Class weights"):
        example_loss(criterion).fitted(lambda: (real(3), real(3)))


def test_one_example_is_enough_to_see_that_a_criterion_mixes():
    with pytest.raises(ValueError, match="mixes the examples"):
        example_loss(contrastive).fitted(lambda: (real(3)[:1], real(3)[:1]))


def supervised_contrastive(f, y):
    """Khosla et al. (2020); zero where no two examples share a class."""
    others = ~torch.eye(len(f), dtype=torch.bool)
    alike = (y[:, None] == y) & others
    surprise = -(f @ f.T).masked_fill(~others, -1e9).log_softmax(1)
    return ((surprise * alike).sum(1) / alike.sum(1).clamp_min(1)).sum() / (alike.any(1).sum().clamp_min(1))


def hardest_triplets(f, y):
    """Hermans et al. (2017), of each example with the farthest of its class and the nearest of another."""
    far, alike = torch.cdist(f, f), y[:, None] == y
    return F.relu((far * alike).amax(1) - far.masked_fill(alike, 1e9).amin(1) + 0.2).mean()


@pytest.mark.parametrize("criterion", [supervised_contrastive, hardest_triplets])
@pytest.mark.parametrize("labels", [torch.arange(32) % 10, torch.arange(32)], ids=["some alike", "all different"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_criterion_of_pairs_is_refused_though_the_first_examples_make_none(criterion, labels, loaded, make):
    """On four examples of four classes it is zero, as it is on each of them."""
    net, x = make(lambda: nn.Linear(4, 3)), torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    batches = DataLoader(TensorDataset(x, labels), batch_size=32) if loaded else [(x, labels)]
    assert criterion(net(x[:4]), labels[:4]) == 0
    with pytest.raises(ValueError, match=rf"{criterion.__name__} mixes the examples of a batch: for .*nn\.Cross"):
        EmpiricalRisk.snapshot(net, criterion, batches)


@pytest.mark.parametrize("last", [True, False], ids=["classes last", "classes second"])
def test_the_mean_over_the_tokens_of_a_batch_is_refused_with_a_remedy_that_works(last, make):
    """Of sequences of several lengths."""
    layers = [nn.Linear(2, 3)] if last else [nn.Linear(2, 3), Transposed()]
    model, x = make(lambda: nn.Sequential(*layers)).double(), real(5, 2)
    batches = [(x, TOKENS)]

    def over_the_batch(f, y):
        return F.cross_entropy(f.movedim(-1, 1) if last else f, y)

    with pytest.raises(ValueError, match="over_the_batch mixes the examples") as raised:
        EmpiricalRisk.snapshot(model, over_the_batch, batches)
    (remedy,) = re.findall(r"EmpiricalRisk\.snapshot\(.*\)(?=\.)", str(raised.value))
    risk = eval(remedy)
    f = model(x).detach().movedim(-1, 1) if last else model(x).detach()
    each = [CE()(a[None], b[None]) if (b != -100).any() else a.sum() * 0 for a, b in zip(f, TOKENS)]
    assert risk.value() == pytest.approx(float(sum(each)) / N)


def remedy_in(message):
    """The code of a message: its lines that are indented."""
    return "\n".join(line[4:] for line in str(message).splitlines() if line.startswith("    "))


def test_two_lines_make_a_fisher_of_a_function(make):
    """As the message shows them; the criterion then trains, too."""
    model, batches = make(lambda: nn.Linear(2, 3)).double(), [(real(2), real(3))]
    with pytest.raises(ValueError, match="The Fisher information is not defined for quartic") as raised:
        CurvatureRegularizer(1.0).absorb(model, quartic, batches)
    known = {**globals(), "f": quartic}
    exec(remedy_in(raised.value), known)
    known["regularizer"].absorb(model, known["criterion"], batches)
    assert known["regularizer"].past.model.curvature.trace() > 0
    f, y = model(batches[0][0]), batches[0][1]
    assert torch.equal(known["criterion"](f, y), quartic(f, y))


def test_two_lines_make_a_criterion_of_a_function(make):
    model, batches = make(lambda: nn.Linear(2, 3)).double(), [(real(2), real(3))]
    with pytest.raises(TypeError, match="such as nn") as raised:
        EmpiricalRisk.snapshot(model, None, batches)
    known = {**globals(), "model": model, "batches": batches}
    exec(remedy_in(raised.value), known)
    assert known["risk"].value() == pytest.approx(F.mse_loss(model(batches[0][0]), batches[0][1]).item())


@pytest.mark.parametrize(
    ("function", "module", "targets"),
    [
        (partial(F.cross_entropy, label_smoothing=0.1), CE(label_smoothing=0.1), LABELS),
        (partial(F.cross_entropy, weight=W, reduction="sum"), CE(W, reduction="sum"), LABELS),
        (partial(F.mse_loss, reduction="sum"), nn.MSELoss(reduction="sum"), real(3)),
        (partial(F.huber_loss, delta=0.3), nn.HuberLoss(delta=0.3), real(3)),
    ],
)
def test_a_function_of_torch_with_options_is_its_module(function, module, targets, close):
    f = real(3)
    found, wanted = example_loss(function), example_loss(module)
    assert type(found) is type(wanted)
    close(found.per_example(f, targets), wanted.per_example(f, targets))
    close(found.gradient(f, targets), wanted.gradient(f, targets))


def test_a_function_with_options_of_its_own_has_its_name():
    weighted = partial(F.mse_loss, weight=torch.ones(3).double())
    for function in (partial(quartic), weighted, partial(F.mse_loss, real(3))):
        assert isinstance(example_loss(function), LossFunction)
        assert example_loss(function).name == function.func.__name__


@pytest.mark.parametrize("criterion", [lambda f: f, lambda f, y: 3.0, nn.CosineEmbeddingLoss()])
def test_what_is_no_criterion_of_outputs_and_targets_is_told_in_two_lines(criterion):
    with pytest.raises((TypeError, ValueError), match=r"in two lines:\n    criterion = LossFunction\(.*\n    risk = "):
        example_loss(criterion).fitted(lambda: (real(3), real(3)))


def test_no_gauss_newton_matrix_is_made_of_a_loss_that_is_not_convex():
    loss = example_loss(lambda f, y: -(f - y).square().mean())
    with pytest.raises(ValueError, match=r"not convex in the outputs: .* eigenvalue -0.667, .*Hessian\(psd=Clip"):
        loss.hessian_factor(real(3), real(3))


def test_a_function_says_how_its_targets_are_drawn(close):
    def drawn(outputs, uniform):
        return outputs + torch.special.ndtri(uniform) / 2**0.5

    loss, f, y = LossFunction(lambda f, y: (f - y).square().sum(), drawn), real(2, 3).reshape(N, 6), real(2, 3)
    loss = loss.fitted(lambda: (f.view(N, 2, 3), y))
    known = example_loss(nn.MSELoss(reduction="sum"))
    uniform = torch.rand(N, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(loss.sample_gradients(f, y, uniform), -known.sample_gradients(f, y, uniform))
    loss.check_likelihood()
    with pytest.raises(ValueError, match=r"exact Fisher information of .* is not known.*Fisher\(samples=1\)"):
        loss.check_expectation()


def test_a_module_is_frozen_with_its_parameters(close):
    criterion = Temperature()
    loss, f = example_loss(criterion), real(3)
    before = loss.per_example(f, LABELS)
    with torch.no_grad():
        criterion.log.add_(1.0)
    close(loss.per_example(f, LABELS), before)
    assert not loss.per_example(f, LABELS).requires_grad


def test_a_function_takes_sequences_of_another_length(close):
    f, y = real(2, 5), real(2, 5)
    loss = example_loss(quartic).fitted(lambda: (f[:, :, :3], y[:, :, :3]))
    close(loss.per_example(f.reshape(N, -1), y), torch.stack([quartic(a, b) for a, b in zip(f, y)]))
    with pytest.raises(ValueError, match=r"no shape like \(2, 3\).*Give batches whose outputs have one shape"):
        loss.per_example(real(7), real(7))


def test_draws_of_large_and_tiny_rates_are_counts():
    f = torch.tensor([[math.log(5000.0), -30.0, 0.0]]).double().expand(N, -1)
    uniform = torch.tensor([0.0, 0.5, 1.0]).double()[None, :, None].expand(N, 3, 3)
    g = example_loss(nn.PoissonNLLLoss(reduction="sum")).sample_gradients(f, f, uniform)
    assert g.isfinite().all()
    assert (f[0].exp() - g[0, :, 1]).tolist() == pytest.approx([5000.0, 0.0, 1.0], abs=1e-6)  # the medians
