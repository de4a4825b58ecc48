import math

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv import EmpiricalRisk
from avalanche_curv.plasticity.measures import gradient_diversity, gradients

CRITERION = nn.CrossEntropyLoss()


def on_paper(rows):
    """Effective rank and condition number of G, whose columns are the gradients, by numpy."""
    values = np.linalg.svd(rows.double().numpy().T, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.prod(shares**-shares)), float(values[0] / values[-1])


def explicit(model, inputs, targets, criterion=CRITERION):
    """The gradient of one example after the other, in eval mode."""
    model.eval()
    rows = []
    for x, y in zip(inputs, targets):
        loss = criterion(model(x[None]), y[None])
        found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True,
                                    materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in found]))
    return torch.stack(rows)


def assert_as_on_paper(found, rows, tolerance=1e-6):
    rank, condition = on_paper(rows)
    assert found.examples == len(rows)
    assert found.effective_rank == pytest.approx(rank, rel=tolerance)
    assert found.condition_number == pytest.approx(condition, rel=tolerance)


def test_it_is_that_of_the_explicit_gradients(problem, architecture, loss_name):
    known = problem(architecture, loss_name)
    assert_as_on_paper(gradient_diversity(known.risk), known.paper.gradients, 1e-5)


MODELS = {
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(16, 3)
    ),
    "frozen first layer": lambda: nn.Sequential(nn.Linear(16, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)),
}


@pytest.mark.parametrize("row_bytes", [0, 2**28])
@pytest.mark.parametrize("name", MODELS)
def test_it_does_not_depend_on_how_many_gradients_are_held_at_once(name, row_bytes, make_model, monkeypatch):
    model = make_model(MODELS[name])
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(11, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (11,), generator=generator)
    risk = EmpiricalRisk.snapshot(model, CRITERION, list(zip(inputs.split(4), targets.split(4))))
    monkeypatch.setattr(gradients, "ROW_BYTES", row_bytes)
    monkeypatch.setattr(gradients, "COLUMNS", 7)
    assert_as_on_paper(gradient_diversity(risk), explicit(model, inputs, targets))


def test_single_precision_costs_no_more_than_that(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 3)))
    inputs = torch.randn(16, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(16) % 3
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
    assert found.effective_rank == pytest.approx(5)
    assert found.condition_number == pytest.approx(1)


def test_identical_gradients_have_diversity_one():
    found = gradient_diversity(linear_risk(torch.ones(5, 8, dtype=torch.float64), torch.ones(5, dtype=torch.float64)))
    assert found.effective_rank == pytest.approx(1)
    assert found.condition_number == math.inf


def test_opposite_gradients_of_other_lengths_have_diversity_one_too():
    targets = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert gradient_diversity(linear_risk(torch.ones(3, 8, dtype=torch.float64), targets)).effective_rank == (
        pytest.approx(1)
    )


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


def test_gradients_that_are_not_finite_have_none(net):
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    inputs = torch.ones(3, 4, dtype=torch.float64)
    found = gradient_diversity(EmpiricalRisk.snapshot(net, CRITERION, [(inputs, torch.arange(3))]))
    assert math.isnan(found.effective_rank)
    assert math.isnan(found.condition_number)
