"""The ratio of a Hessian's diagonal and the errors of an expansion against paper."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv import EmpiricalRisk
from benchmarks.experiments.taylor import experiment as taylor
from benchmarks.experiments.taylor.ratio import INPUTS, Inputs, expected_ratio, explained, fitted, hessian, ratio
from benchmarks.experiments.taylor.report import agreement, ends_beyond, report
from benchmarks.harness import Context, Options, Results
from benchmarks.harness.experiment import describe

GRID = taylor.sizes((4, 16, 64), (1, 4, 16, 64))


def test_the_closed_form_for_standard_normal_inputs():
    for m, d in ((8, 3), (100, 20), (10**6, 300)):
        assert expected_ratio(Inputs(), m, d) == pytest.approx(1 / (1 + (d - 1) * math.sqrt(2 / (math.pi * m))))
    assert expected_ratio(Inputs(), 10, 1) == 1
    assert expected_ratio(Inputs(), math.inf, 50) == 1


def test_the_closed_form_depends_on_m_over_d_squared_alone_for_large_d():
    along = [expected_ratio(Inputs(), d**2, d) for d in (1000, 3000)]
    assert along[0] == pytest.approx(along[1], rel=1e-3)
    assert along[1] == pytest.approx(1 / (1 + math.sqrt(2 / math.pi)), rel=1e-3)


def test_the_limits_of_inputs_that_are_correlated_or_not_centred():
    """(1 + m²) / (1 + m² + (D − 1) |ρ + m²|): with ρ = ½ and D = 3 it is ½, with m² = 3 it is 4 / (3 D + 1)."""
    assert expected_ratio(Inputs(correlation=0.5), math.inf, 3) == pytest.approx(0.5)
    assert expected_ratio(Inputs(mean=math.sqrt(3)), math.inf, 5) == pytest.approx(4 / 16)
    assert expected_ratio(Inputs(mean=1.0), 1e12, 4) == pytest.approx(2 / 5)


@pytest.mark.parametrize("inputs", [*INPUTS.values(), Inputs(mean=0.2, correlation=0.1)])
def test_the_measured_ratio_is_the_closed_form(inputs):
    generator = np.random.default_rng(0)
    found = np.mean([ratio(hessian(inputs, 200, 20, generator)) for _ in range(40)])
    assert found == pytest.approx(expected_ratio(inputs, 200, 20), rel=0.03)


def test_inputs_have_the_moments_that_the_closed_form_takes():
    inputs = Inputs(mean=0.5, correlation=0.3)
    x = inputs.draw(400_000, 2, np.random.default_rng(0))
    products = x[:, 0] * x[:, 1]
    assert np.square(x).mean() == pytest.approx(inputs.diagonal, rel=0.01)
    assert products.mean() == pytest.approx(inputs.product, rel=0.01)
    assert products.var() == pytest.approx(inputs.product_variance, rel=0.02)


def test_a_line_is_explained_by_a_line_and_the_mean_explains_nothing():
    x = np.array([1.0, 2.0, 4.0])
    values = 3 + 2 * x
    assert explained(values, fitted(values, np.ones(3), x)) == pytest.approx(1)
    assert explained(values, np.full(3, values.mean())) == pytest.approx(0)
    assert fitted(np.array([1.0, 0.0]), np.array([1.0, 1.0])).tolist() == pytest.approx([0.5, 0.5])


def test_the_law_of_the_note_loses_to_the_closed_form():
    rows = list(taylor.experiment.run(taylor.Ratio("standard normal", Inputs(), GRID), 0, None))
    found = agreement(rows, Inputs())
    assert found["closed form"] > 0.98
    assert found["b log(M/D)"] < found["a + b log(M/D)"] < 0.8
    at_four = {row["dimension"]: row["value"] for row in rows if row["examples"] == 4 * row["dimension"]}
    assert at_four[4] > 2 * at_four[64]


def expansion_of(model, criterion, x, y):
    return taylor.Expansion.of(EmpiricalRisk.snapshot(model, criterion, [(x, y)]))


def test_errors_in_two_dimensions_are_those_on_paper():
    """X = (1 1; 1 0) and y = 0 at w = 0: H = (2 1; 1 1). For δ = (3, −2): ½ δᵀHδ = 5, ½ δᵀ diag(H) δ = 11."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    expansion = expansion_of(model, nn.MSELoss(), x, torch.zeros(2, 1, dtype=torch.float64))
    model.weight.data = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    found = expansion.errors(model)
    expected = {"distance": math.sqrt(13), "increase": 5, "predicted": 11, "diagonal": 6, "slope": 0, "taylor": 0}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12)


def test_a_quadratic_loss_is_its_expansion_and_not_its_diagonal():
    config = next(c for c in taylor.paths(None) if c.label == "linear regression")
    records = list(taylor.along(replace(config, steps=20), 0, None))
    names = "taylor", "ggn", "slope", "diagonal"
    errors = {name: [record["value"] for record in records if record["metric"] == name] for name in names}
    assert len(errors["taylor"]) == len(taylor.measured_steps(20))
    assert max(errors["taylor"] + errors["ggn"] + errors["slope"]) < 1e-12  # the anchor is the minimum
    assert min(errors["diagonal"]) > 1e-4


def test_near_the_anchor_the_taylor_error_is_cubic_and_the_diagonal_error_quadratic():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(3, (20,))
    expansion = expansion_of(model, nn.CrossEntropyLoss(), x, y)
    start = [p.detach().clone() for p in model.parameters()]
    direction = [torch.randn_like(p) for p in start]
    found = []
    for scale in (1e-2, 5e-3):
        for p, at, step in zip(model.parameters(), start, direction):
            p.data = at + scale * step
        found.append(expansion.errors(model))
    for name, power in (("taylor", 3), ("diagonal", 2), ("ggn", 2), ("slope", 1)):
        assert found[0][name] / found[1][name] == pytest.approx(2**power, rel=0.05)


def test_the_crossover_is_the_first_place_where_the_expansion_is_worse():
    found = [
        {"distance": float(d), "increase": 10.0 * d, "taylor": t, "diagonal": 1.0}
        for d, t in ((1, 0.5), (2, 2.0), (3, 0.9), (4, 3.0))
    ]
    records = {record["metric"]: record["value"] for record in taylor.crossover(found)}
    assert records == {"dominated": 0.5, "crossover": 2.0, "crossover_increase": 20.0}
    assert [record["metric"] for record in taylor.crossover(found[:1])] == ["dominated"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One seed of a few configurations; others are missing."""
    configs = taylor.experiment.configs(Options(quick=True))
    rows, headers = [], []
    for config in configs:
        if config.label in ("standard normal", "linear regression", "digits, tanh"):
            if config.label == "digits, tanh":
                config = replace(config, problem=replace(config.problem, steps=2, hidden=4), steps=3)
            context = Context(0, True, None, tmp_path_factory.mktemp("board"))
            for record in taylor.experiment.run(config, 0, context):
                plain = {"step": None, **record, "value": float(record["value"])}
                rows.append({**plain, "label": config.label, "seed": 0})
            headers.append({"label": config.label, "seed": 0, "config": describe(config)})
    return Results(tuple(c.label for c in configs), tuple(rows), tuple(headers), {"units": configs})


def test_a_report_of_incomplete_results_is_written(results, tmp_path):
    written = report(results, tmp_path)
    assert "| standard normal |" in written
    assert "| mean 1" not in written
    assert "| linear regression, step 1 " in written
    assert (tmp_path / "ratio.png").exists()
    assert (tmp_path / "errors.png").exists()
    for own, other in ((1, 2), (2, 1)):
        assert f"## Assumption {other}" not in report(results.where(assumption=own), tmp_path)


def test_the_summary_counts_runs(results):
    assert ends_beyond(results.of(["linear regression"])) == 0
    rows = tuple(
        {"metric": name, "label": "digits, tanh", "seed": 1, "step": step, "value": value}
        for name, *values in (("taylor", 0.0, 2.0), ("diagonal", 1.0, 1.0))
        for step, value in enumerate(values)
    )
    assert ends_beyond(Results(("digits, tanh",), rows)) == 1
