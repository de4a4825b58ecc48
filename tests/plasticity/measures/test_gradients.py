import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv import EmpiricalRisk
from avalanche_curv.plasticity.measures import gradient_diversity, gradients

CRITERION = nn.CrossEntropyLoss()
WEIGHTS = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
CRITERIA = {
    "cross-entropy": CRITERION,
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.3),
    "mean square": nn.MSELoss(),
    "summed square": nn.MSELoss(reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
    "summed binary": nn.BCEWithLogitsLoss(reduction="sum"),
}


def explicit(model, inputs, targets, criterion=CRITERION):
    """The gradient of one example after the other, in eval mode."""
    criterion = copy.copy(criterion)
    if isinstance(criterion, nn.CrossEntropyLoss):
        criterion.reduction = "sum"  # of one example the mean would divide by its class weight
    model.eval()
    rows = []
    for x, y in zip(inputs, targets):
        loss = criterion(model(x[None]), y[None])
        parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True,
                                    materialize_grads=True)  # fmt: skip
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def assert_as_on_paper(found, rows, tolerance=1e-6):
    """Effective rank and condition number are those of G, whose columns are the gradients, by numpy."""
    values = np.linalg.svd(rows.double().numpy().T, compute_uv=False)
    shares = values[values > 0] / values.sum()
    assert found.examples == len(rows)
    assert found.effective_rank == pytest.approx(float(np.prod(shares**-shares)), rel=tolerance)
    assert found.condition_number == pytest.approx(float(values[0] / values[-1]), rel=tolerance)


def examples(n, classes=True):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (n,), generator=generator) if classes else inputs[:, :3].sigmoid()


MODELS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(16, 3)
    ),
    "frozen first layer": lambda: nn.Sequential(nn.Linear(16, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_it_is_that_of_the_explicit_gradients(name, loss, make_model):
    model, criterion = make_model(MODELS[name]), CRITERIA[loss]
    inputs, targets = examples(7, classes=isinstance(criterion, nn.CrossEntropyLoss))
    risk = EmpiricalRisk.snapshot(model, criterion, list(zip(inputs.split(4), targets.split(4))))
    assert_as_on_paper(gradient_diversity(risk), explicit(model, inputs, targets, criterion), 1e-5)


@pytest.mark.parametrize("row_bytes", [0, 2**28])
@pytest.mark.parametrize("name", MODELS)
def test_it_does_not_depend_on_how_many_gradients_are_held_at_once(name, row_bytes, make_model, monkeypatch):
    model = make_model(MODELS[name])
    inputs, targets = examples(11)
    risk = EmpiricalRisk.snapshot(model, CRITERION, list(zip(inputs.split(4), targets.split(4))))
    monkeypatch.setattr(gradients, "ROW_BYTES", row_bytes)
    monkeypatch.setattr("avalanche_curv.core.per_example.gram.COLUMNS", 7)
    assert_as_on_paper(gradient_diversity(risk), explicit(model, inputs, targets))


def test_single_precision_costs_no_more_than_that(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3)))
    inputs, targets = examples(16)
    rows = explicit(model, inputs, targets)
    risk = EmpiricalRisk.snapshot(model.float(), CRITERION, [(inputs.float(), targets)])
    assert_as_on_paper(gradient_diversity(risk), rows, 1e-4)


# --- on paper: of ½‖w·x − y‖², the gradient in w is r x, with the residual r ---


def linear_risk(inputs, targets):
    model = nn.Linear(inputs.shape[1], 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return EmpiricalRisk.snapshot(model, nn.MSELoss(), [(inputs, targets[:, None])])


def test_m_orthogonal_gradients_of_one_length_have_diversity_m():
    inputs = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    found = gradient_diversity(linear_risk(inputs[:5], torch.ones(5, dtype=torch.float64)))
    assert (found.effective_rank, found.condition_number) == (pytest.approx(5), pytest.approx(1))


@pytest.mark.parametrize("targets", [[1.0, 1.0, 1.0, 1.0], [1.0, -2.0, 3.0]])
def test_collinear_gradients_have_diversity_one_whatever_their_signs_and_lengths(targets):
    inputs = torch.ones(len(targets), 8, dtype=torch.float64)
    found = gradient_diversity(linear_risk(inputs, torch.tensor(targets, dtype=torch.float64)))
    assert (found.effective_rank, found.condition_number) == (pytest.approx(1), math.inf)


def test_residuals_set_the_condition():
    targets = torch.tensor([1.0, 4.0], dtype=torch.float64)
    found = gradient_diversity(linear_risk(torch.eye(2, dtype=torch.float64), targets))  # p = 1/5, 4/5
    assert found.condition_number == pytest.approx(4)
    assert found.effective_rank == pytest.approx(5 / 4**0.8)


@pytest.mark.parametrize("layers", [
    [nn.Linear(8, 1, bias=False)], [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 1, 8, bias=False), nn.Flatten()],
])
def test_gradients_that_are_nearly_collinear_are_told_apart_in_single_precision(layers):
    inputs = torch.ones(5, 8) + 2**-13 * torch.eye(5, 8)  # exactly as written, and lost in their squares
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    found = gradient_diversity(EmpiricalRisk.snapshot(model, nn.MSELoss(), [(inputs, torch.ones(5, 1))]))
    assert_as_on_paper(found, inputs, 1e-3)  # rows that are formed are rounded once more
    assert found.condition_number > 1e4


def test_examples_that_are_learned_exactly_span_nothing():
    found = gradient_diversity(linear_risk(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)))
    assert (found.effective_rank, found.condition_number) == (0.0, math.inf)


def test_gradients_that_are_not_finite_have_none(make_model):
    model = make_model(MODELS["perceptron"])
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    found = gradient_diversity(EmpiricalRisk.snapshot(model, CRITERION, [examples(3)]))
    assert math.isnan(found.effective_rank)
    assert math.isnan(found.condition_number)
