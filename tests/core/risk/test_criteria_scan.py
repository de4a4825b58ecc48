"""Every criterion of torch, with its options and targets: as an explicit loop says, or refused with a remedy."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from avalanche_curv import (
    GGN,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Kronecker,
    estimate,
)

pytestmark = pytest.mark.slow

N = 5
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 1, 2])
W = torch.tensor([0.5, 2.0, 1.1], dtype=torch.float64)


def real(*shape):
    return torch.randn(N, *shape, generator=GENERATOR, dtype=torch.float64)


def unit(*shape):
    return torch.rand(N, *shape, generator=GENERATOR, dtype=torch.float64)


def yes(*shape):
    return (unit(*shape) > 0.5).double()


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss

AGREE = {  # criterion, shape of one output, targets
    "cross-entropy": (CE(), (3,), LABELS),
    "cross-entropy, summed": (CE(reduction="sum"), (3,), LABELS),
    "cross-entropy, none": (CE(reduction="none"), (3,), LABELS),
    "cross-entropy of bytes": (CE(), (3,), LABELS.byte()),
    "cross-entropy, smoothed": (CE(label_smoothing=0.2), (3,), LABELS),
    "cross-entropy, smoothed bytes": (CE(label_smoothing=0.2), (3,), LABELS.byte()),
    "cross-entropy, weighted": (CE(W), (3,), LABELS),
    "cross-entropy, weighted and summed": (CE(W, reduction="sum"), (3,), LABELS),
    "cross-entropy, equal weights": (CE(7 * torch.ones(3).double()), (3,), LABELS),
    "cross-entropy, one weight of zero": (CE(torch.tensor([1.0, 0.0, 2.0]).double()), (3,), LABELS),
    "cross-entropy, weights in single precision": (CE(torch.tensor([1.0, 0.5, 1.5])), (3,), LABELS),
    "cross-entropy, weighted and smoothed": (CE(W, label_smoothing=0.3), (3,), LABELS),
    "cross-entropy, no ignored label there": (CE(ignore_index=7), (3,), LABELS),
    "squares": (MSE(), (3,), real(3)),
    "squares, summed": (MSE(reduction="sum"), (3,), real(3)),
    "squares of one output": (MSE(), (1,), real(1)),
    "squares of one number": (MSE(), (), real()),
    "squares of two axes": (MSE(), (2, 3), real(2, 3)),
    "squares of two axes, summed": (MSE(reduction="sum"), (2, 3), real(2, 3)),
    "squares in single precision": (MSE(), (3,), real(3).float()),
    "squares of integers": (MSE(), (3,), real(3).round().long()),
    "squares of yes and no": (MSE(), (3,), yes(3).bool()),
    "binary": (BCE(), (3,), yes(3)),
    "binary, summed": (BCE(reduction="sum"), (3,), yes(3)),
    "binary, soft": (BCE(), (3,), unit(3)),
    "binary in single precision": (BCE(), (3,), yes(3).float()),
    "binary of one number": (BCE(), (), yes()),
    "binary of two axes": (BCE(), (2, 3), yes(2, 3)),
    "binary, pos_weight a number": (BCE(pos_weight=torch.tensor(3.0).double()), (3,), yes(3)),
    "binary, pos_weight [1]": (BCE(pos_weight=torch.tensor([3.0]).double()), (), yes()),
    "binary, pos_weight [C]": (BCE(pos_weight=W), (3,), unit(3)),
    "binary, pos_weight [C, 1]": (BCE(pos_weight=W[:, None]), (3, 2), yes(3, 2)),
    "binary, pos_weight [1, C]": (BCE(pos_weight=W[None], reduction="sum"), (3,), yes(3)),
    "binary, pos_weight [C] on two axes": (BCE(pos_weight=W), (2, 3), unit(2, 3)),
    "binary, weight [C]": (BCE(W), (3,), yes(3)),
    "binary, weight and pos_weight": (BCE(W[:, None], pos_weight=W[:2]), (3, 2), unit(3, 2)),
}


class Halved(CE):
    def forward(self, outputs, targets):
        return super().forward(outputs, targets) / 2


REFUSED = {
    "labels of 32 bits": (CE(), (3,), LABELS.int()),
    "labels of 8 bits with a sign": (CE(), (3,), LABELS.to(torch.int8)),
    "labels of yes and no": (CE(), (3,), LABELS.bool()),
    "labels as numbers": (CE(), (3,), LABELS.double()),
    "labels in a column": (CE(), (3,), LABELS[:, None]),
    "probabilities of classes": (CE(), (3,), unit(3).softmax(1)),
    "an ignored label": (CE(ignore_index=1), (3,), LABELS),
    "a label too high": (CE(), (2,), LABELS),
    "weights for other classes": (CE(W[:2]), (3,), LABELS),
    "weights of zero": (CE(torch.zeros(3)), (3,), LABELS),
    "negative weights": (CE(-W), (3,), LABELS),
    "labels of pixels": (CE(), (3, 2), LABELS[:, None].expand(N, 2)),
    "squares: a vector against a column": (MSE(), (1,), real()),
    "squares: a column against a vector": (MSE(), (), real(1)),
    "squares: a column against a matrix": (MSE(), (3,), real(1)),
    "squares: another width": (MSE(), (3,), real(2)),
    "squares: axes in another order": (MSE(), (3, 2), real(2, 3)),
    "binary: a vector against a column": (BCE(), (1,), yes()),
    "binary: a column against a vector": (BCE(), (), yes(1)),
    "binary: integers": (BCE(), (3,), yes(3).long()),
    "binary: yes and no": (BCE(), (3,), yes(3).bool()),
    "binary: targets outside [0, 1]": (BCE(), (3,), 2 * yes(3) - 1),
    "binary: weights by place": (BCE(unit(1)), (3,), yes(3)),
    "binary: positive weights by place": (BCE(pos_weight=unit(3)), (3,), yes(3)),
    "binary: weights of another width": (BCE(pos_weight=W[:2]), (3,), yes(3)),
    "a subclass that overrides": (Halved(), (3,), LABELS),
    "a function": (F.cross_entropy, (3,), LABELS),
    **{
        name: (loss(), (3,), LABELS)
        for name, loss in vars(nn).items()
        if inspect.isclass(loss) and name.endswith("Loss") and loss not in (CE, MSE, BCE)
        and not any(p.default is p.empty for p in inspect.signature(loss).parameters.values())  # layers of their own
    },
}  # fmt: skip


def model_for(shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.Unflatten(1, shape) if shape else nn.Flatten(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, math.prod(shape)), last).double()


class Loop:
    """Loss, gradient, GGN, Fisher and Hessian, one example after the other, from torch's own criterion."""

    def __init__(self, model, criterion, targets):
        self.model, self.criterion, self.targets = model, criterion, targets
        self.sizes = [p.numel() for p in model.parameters()]
        self.theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(self, theta, i):
        parts = zip(self.model.named_parameters(), theta.split(self.sizes))
        named = {name: part.view_as(p) for (name, p), part in parts}
        return functional_call(self.model, named, (INPUTS[i : i + 1],))

    def loss(self, f, y):
        """What torch returns for a batch of one; under its mean, class weights relative to their mean."""
        weight = getattr(self.criterion, "weight", None)
        if isinstance(self.criterion, CE):
            y = y.long()
            if weight is not None and self.criterion.reduction == "mean":
                relative = (weight / weight.mean()).to(f)
                return F.cross_entropy(f, y, relative, reduction="sum", label_smoothing=self.criterion.label_smoothing)
        return self.criterion(f, y.to(f) if not isinstance(self.criterion, CE) else y).sum()

    def expected(self, kind, i):
        y, f = self.targets[i : i + 1], self.outputs(self.theta, i).detach()
        jacobian = jacrev(self.outputs)(self.theta, i).detach().reshape(-1, len(self.theta))
        if kind == Hessian():
            return hessian(lambda theta: self.loss(self.outputs(theta, i), y))(self.theta)
        if kind == GGN():
            inner = hessian(lambda v: self.loss(v.view_as(f), y))(f.reshape(-1))
        elif kind == EmpiricalFisher():
            slope = self.slope(f, y)
            inner = slope.outer(slope)
        else:
            inner = self.fisher(f)
        return jacobian.T @ inner @ jacobian

    def slope(self, f, y):
        free = f.clone().requires_grad_()
        return torch.autograd.grad(self.loss(free, y), free)[0].reshape(-1)

    def fisher(self, f):
        """E_y[∇ log p ∇ log pᵀ] for the outputs of one example, as a sum over classes or in closed form."""
        v, mean = f.reshape(-1), self.criterion.reduction == "mean"
        if isinstance(self.criterion, CE):
            p, eye = v.softmax(0), torch.eye(len(v)).double()
            return sum(p[c] * (p - eye[c]).outer(p - eye[c]) for c in range(len(v)))
        scale = 1 / len(v) if mean else 1.0
        if isinstance(self.criterion, MSE):
            return 2 * scale * torch.eye(len(v)).double()
        return (scale * v.sigmoid() * (1 - v.sigmoid())).diag()


def is_likelihood(criterion):
    weights = [w for w in (criterion.__dict__ | criterion._buffers).items() if "weight" in w[0] and w[1] is not None]
    equal = isinstance(criterion, CE) and criterion.reduction == "mean" and all(w.std() == 0 for _, w in weights)
    return equal or not weights


@pytest.mark.parametrize("case", AGREE.values(), ids=AGREE)
def test_the_risk_and_its_curvature_are_those_of_the_loop(case, close):
    criterion, shape, targets = case
    model = model_for(shape)
    loop = Loop(model, criterion, targets)
    risk = EmpiricalRisk.snapshot(model, criterion, list(zip(INPUTS.split(3), targets.split(3))))
    losses = [loop.loss(loop.outputs(loop.theta, i), targets[i : i + 1]) for i in range(N)]
    assert risk.value() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    jacobians = [jacrev(loop.outputs)(loop.theta, i).detach().reshape(-1, len(loop.theta)) for i in range(N)]
    slopes = [loop.slope(loop.outputs(loop.theta, i).detach(), targets[i : i + 1]) for i in range(N)]
    close(risk.gradient(), torch.stack([j.T @ s for j, s in zip(jacobians, slopes)]).mean(0))
    kinds = [GGN(), EmpiricalFisher(), Hessian()] + [Fisher()] * is_likelihood(criterion)
    for kind in kinds:
        expected = torch.stack([loop.expected(kind, i) for i in range(N)]).mean(0).detach()
        close(estimate(kind, Dense(), risk).curvature.dense(), expected)
        close(estimate(kind, Diagonal(), risk).curvature.dense(), expected.diagonal().diag())
    assert estimate(GGN(), Kronecker(), risk).curvature.trace() > 0
    if not is_likelihood(criterion):
        with pytest.raises(ValueError, match=r"no log-likelihood. Use .*or drop"):
            estimate(Fisher(), Dense(), risk)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_is_refused_with_a_remedy(case):
    criterion, shape, targets = case
    with pytest.raises((TypeError, ValueError), match=r"(Write|Convert|Drop|Give|Reshape|Scale|Let|Did you mean) "):
        EmpiricalRisk.snapshot(model_for(shape), criterion, [(INPUTS, targets)])
