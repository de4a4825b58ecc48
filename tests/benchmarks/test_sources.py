"""κ of single examples in each structure against explicit matrices, the watcher, and the counted claims."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from avalanche_curv import EmpiricalRisk
from benchmarks.experiments.sources.experiment import BATCH, Watcher, all_recipes, experiment
from benchmarks.experiments.sources.per_example import derivatives, losses_at
from benchmarks.experiments.sources.report import Measured, report
from benchmarks.harness import Options, Results

QUICK = Options(quick=True)


@pytest.fixture(scope="module")
def risk():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 2).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])


def matrix_of(kind, risk, examples):
    """The curvature of some examples alone, whole."""
    x, y = next(iter(risk))
    part = replace(risk, batches=((x[examples], y[examples]),))
    return kind.operator(part).matmat(torch.eye(risk.space.size).double())


def restricted_to(structure, matrix, sizes):
    if structure == "diagonal":
        return matrix.diagonal().diag()
    return matrix if structure == "dense" else matrix * torch.block_diag(*[torch.ones(n, n).double() for n in sizes])


@pytest.mark.parametrize("name", ["Hessian", "GGN", "empirical", "batched"])
@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
def test_the_increase_of_an_example_is_that_of_its_own_restricted_matrix(risk, name, structure):
    kind = next(recipe.curvature for recipe in all_recipes() if recipe.kind_name == name)
    delta = torch.randn(risk.space.size, generator=torch.Generator().manual_seed(1)).double()
    found = derivatives(kind, risk).increase(structure, delta)
    size = BATCH if name == "batched" else 1
    units = torch.arange(6).split(size)
    assert len(found) == len(units)
    for value, unit in zip(found, units):
        matrix = restricted_to(structure, matrix_of(kind, risk, unit), risk.space.sizes)
        assert float(value) == pytest.approx(float(0.5 * delta @ matrix @ delta), rel=1e-9)


def test_losses_of_units_are_means_over_batches(risk):
    single = losses_at(1, risk, risk.anchor)
    expected = [float(single[:4].mean()), float(single[4:].mean())]
    assert losses_at(4, risk, risk.anchor).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "trajectory", ["regularised", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sequential", "replay"))]
)
def test_at_its_anchor_a_quadratic_model_is_exact_and_further_on_it_is_not(trajectory):
    config = next(c for c in experiment.configs(QUICK) if c.trajectory == trajectory)
    records = experiment.run(config, 0, None)
    errors = [r["value"] for r in records if r["metric"] == "error"]
    assert len(errors) == len(config.recipes)
    assert all(0 <= error < 10 for error in errors)
    still = replace(config, setting=replace(config.setting, rate=0.0, weight_decay=0.0))
    records = experiment.run(still, 0, None)
    assert all(r["value"] == pytest.approx(0, abs=1e-6) for r in records if r["metric"] in ("error", "kappa"))


def results(*rows):
    """Results from (policy, seed, κ) of dense GGN models along sequential training."""
    names = {"trajectory": "sequential", "kind": "GGN", "structure": "dense", "metric": "kappa"}
    return Results(("sequential",), tuple(
        {**names, "policy": policy, "label": "sequential", "seed": seed, "step": None, "value": value}
        for policy, seed, value in rows
    ))


def test_a_difference_says_whether_it_is_within_noise():
    above = [("accumulate", seed, 2.0) for seed in range(3)]

    def difference(*values, key=("kappa", "sequential", "{}", "GGN", "dense"), turned=False):
        found = Measured.of(results(*(("refresh", s, v) for s, v in enumerate(values)), *above))
        pair = [tuple(part.format(policy) for part in key) for policy in ("refresh", "accumulate")]
        return found.difference(*(reversed(pair) if turned else pair))

    assert difference(1.0, 1.01, 1.02) == "-0.990"
    assert difference(1.0, 1.01, 1.02, turned=True) == "+0.990"
    assert difference(1.0, key=("kappa", "replay", "{}", "GGN", "dense")) == "–"
    assert difference(1.0, 3.0, 1.5) == "-0.167 ≈"
    assert difference(1.0, float("nan"), 1.5) == "+nan (undefined)"


def test_derivatives_are_those_of_the_anchor_of_the_moment(monkeypatch):
    """An adaptive policy frees its old models during training, and Python gives their places to new ones."""
    looked = []

    def spy(self, recipe, number, risk, original=Watcher._derivatives):
        found = original(self, recipe, number, risk)
        looked.append(float((found.anchor - risk.anchor).abs().max()))
        return found

    monkeypatch.setattr(Watcher, "_derivatives", spy)
    config = experiment.configs(QUICK)[0]
    recipes = [recipe for recipe in all_recipes() if recipe.policy_name == "adaptive"][4:10]
    setting = replace(config.setting, experiences=4, steps=30, every=5)
    experiment.run(replace(config, recipes=tuple(recipes), setting=setting), 0, None)
    assert len(looked) > 50
    assert max(looked) == 0


def test_a_report_of_few_results_says_what_it_has():
    names = {"trajectory": "replay", "policy": "refresh", "kind": "GGN", "structure": "low rank"}
    row = {"metric": "error", "label": "replay", "seed": 0, "step": None, "value": 0.25, **names}
    assert "| low rank, refresh | 0.250 |" in report(Results(("replay",), (row,)), None).replace("  ", "")
