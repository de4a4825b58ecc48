"""What weights mean: torch's mean divides by class weights and by no others, and broadcasts those of binary outputs."""

import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    LowRank,
    Rank,
    estimate,
    example_loss,
)

WEIGHTS = torch.tensor([0.5, 2.0, 1.1]).double()


@pytest.fixture
def batch():
    """As many examples of each class."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.tensor([0, 1, 2, 2, 1, 0])


def risk_of(net, criterion, batch):
    return EmpiricalRisk.snapshot(net, criterion, [batch])


@pytest.mark.parametrize("kind", [GGN(), Fisher(), EmpiricalFisher(), Hessian()])
def test_equal_class_weights_curve_like_none_as_they_train(kind, net, batch, close):
    plain, weighted = (nn.CrossEntropyLoss(weight) for weight in (None, torch.full((3,), 1000.0).double()))
    close(weighted(net(batch[0]), batch[1]), plain(net(batch[0]), batch[1]))
    here, there = (risk_of(net, criterion, batch) for criterion in (weighted, plain))
    close(estimate(kind, Dense(), here).curvature.dense(), estimate(kind, Dense(), there).curvature.dense())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_over_balanced_classes_the_risk_is_the_mean_that_torch_trains(smoothing, scale, net, batch, close):
    criterion = nn.CrossEntropyLoss(scale * WEIGHTS, label_smoothing=smoothing)
    loss, risk = criterion(net(batch[0]), batch[1]), risk_of(net, criterion, batch)
    assert risk.value() == pytest.approx(loss.item(), rel=1e-12)
    close(risk.gradient(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))]))


def test_a_criterion_that_sums_takes_class_weights_as_they_are(net, batch, close):
    criterion = nn.CrossEntropyLoss(WEIGHTS, reduction="sum")
    summed = criterion(net(batch[0]), batch[1]).item()
    assert risk_of(net, criterion, batch).value() * 6 == pytest.approx(summed, rel=1e-12)
    with pytest.raises(ValueError, match="no log-likelihood"):
        risk_of(net, criterion, batch).loss.check_likelihood()


def test_weights_are_those_of_the_moment_at_which_the_loss_is_looked_at(net, batch):
    criterion = nn.CrossEntropyLoss(WEIGHTS.clone(), reduction="sum")
    risk = risk_of(net, criterion, batch)
    before = risk.value()
    criterion.weight.mul_(7)
    assert risk.value() == before


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [1.0, -1.0, 3.0], [1.0, float("nan"), 1.0]])
def test_class_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="finite, at least 0 and not all 0; got"):
        example_loss(nn.CrossEntropyLoss(torch.tensor(weights)))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3), (1, 2, 3), (1, 1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_binary_outputs_broadcast_as_in_torch(shape, reduction, batch, close):
    generator = torch.Generator().manual_seed(1)
    positive, weight = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    criterion = nn.BCEWithLogitsLoss(weight, pos_weight=positive, reduction=reduction)
    y = torch.rand(6, 2, 3, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))).double()
    risk = risk_of(model, criterion, (batch[0], y))
    singles = [criterion(model(x[None]), t[None]) for x, t in zip(batch[0], y)]
    assert risk.value() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-12)
    parts = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in singles]
    rows = torch.stack([torch.cat([g.reshape(-1) for g in part]) for part in parts])
    close(risk.gradient(), rows.mean(0))
    close(estimate(EmpiricalFisher(), Dense(), risk).curvature.dense(), rows.T @ rows / 6)
    whole = estimate(GGN(), Dense(), risk).curvature.dense()
    close(whole, estimate(Hessian(), Dense(), risk).curvature.dense())  # the model is linear
    close(whole.diagonal().diag(), estimate(Hessian(), Diagonal(), risk).curvature.dense())
    close(risk.loss.summed(risk.one_output, y)(model(batch[0]), y) / 6, torch.stack(singles).mean())


def test_a_single_output_takes_a_single_weight(batch, close):
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    criterion, y = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]).double()), (batch[1] > 0).double()
    risk = risk_of(model, criterion, (batch[0], y))
    assert risk.value() == pytest.approx(criterion(model(batch[0]), y).item(), rel=1e-12)
    assert estimate(GGN(), LowRank(Rank(2)), risk).curvature.trace() > 0


def test_the_fisher_of_weighted_outputs_is_refused():
    with pytest.raises(ValueError, match="with pos_weight or weight, which is no log-likelihood"):
        example_loss(nn.BCEWithLogitsLoss(torch.ones(3))).check_likelihood()
