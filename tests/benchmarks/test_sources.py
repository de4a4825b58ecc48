"""κ of single examples in each structure against explicit matrices, the watcher, and the counted claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.experiments.sources.report import difference, report
from benchmarks.harness.experiment import Context
from benchmarks.harness.results import Results


@pytest.fixture(scope="module")
def risk():
    from avalanche_curv import EmpiricalRisk

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(6, 2).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])


def matrix_of(kind, risk, examples):
    """The curvature of some examples alone, whole."""
    x, y = next(iter(risk))
    part = replace(risk, batches=((x[examples], y[examples]),))
    return kind.operator(part).matmat(torch.eye(risk.space.size).double())


@pytest.mark.parametrize("name", ["Hessian", "GGN", "empirical", "batched"])
@pytest.mark.parametrize("structure", ["dense", "block", "diagonal"])
def test_the_increase_of_an_example_is_that_of_its_own_restricted_matrix(risk, name, structure, restricted_to):
    from benchmarks.experiments.sources.grid import BATCH, KINDS
    from benchmarks.experiments.sources.pictures import derivatives

    kind = KINDS[name]
    delta = torch.randn(risk.space.size, generator=torch.Generator().manual_seed(1)).double()
    found = derivatives(kind, risk).increase(structure, delta)
    size = BATCH if name == "batched" else 1
    units = torch.arange(6).split(size)
    assert len(found) == len(units)
    for value, unit in zip(found, units):
        matrix = restricted_to(structure, matrix_of(kind, risk, unit), risk.space.sizes)
        assert float(value) == pytest.approx(float(0.5 * delta @ matrix @ delta), rel=1e-9)


@pytest.fixture
def restricted_to():
    def restrict(structure, matrix, sizes):
        if structure == "diagonal":
            return matrix.diagonal().diag()
        if structure == "dense":
            return matrix
        return matrix * torch.block_diag(*[torch.ones(n, n).double() for n in sizes])

    return restrict


def test_losses_of_units_are_means_over_batches(risk):
    from benchmarks.experiments.sources.pictures import losses_at

    single = losses_at(1, risk, risk.anchor)
    expected = [float(single[:4].mean()), float(single[4:].mean())]
    assert losses_at(4, risk, risk.anchor).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("trajectory", ["sequential", "replay", "regularised"])
def test_at_its_anchor_a_picture_is_exact_and_further_on_it_is_not(trajectory, tmp_path):
    from benchmarks.experiments.sources.grid import configs
    from benchmarks.experiments.sources.run import run

    config = next(c for c in configs(quick=True) if c.trajectory == trajectory)
    records = run(config, 0, Context(0, True, None, Path(tmp_path)))
    errors = [r["value"] for r in records if r["metric"] == "error"]
    assert len(errors) == len(config.pictures)
    assert all(0 <= error < 10 for error in errors)
    still = replace(config, setting=replace(config.setting, rate=0.0, weight_decay=0.0))
    records = run(still, 0, Context(0, True, None, Path(tmp_path)))
    assert all(r["value"] == pytest.approx(0, abs=1e-6) for r in records if r["metric"] in ("error", "kappa"))


def test_a_difference_says_whether_it_is_within_noise():
    def row(policy, seed, value):
        names = {"policy": policy, "kind": "GGN", "structure": "dense"}
        return {"metric": "kappa", "label": "sequential", "seed": seed, "step": None, "value": value, **names}

    rows = [row("refresh", s, 1.0 + 0.01 * s) for s in range(3)] + [row("accumulate", s, 2.0) for s in range(3)]
    found = Results(("sequential",), tuple(rows))
    key = ("sequential", "{}", "GGN", "dense")
    below, above = tuple(k.format("refresh") for k in key), tuple(k.format("accumulate") for k in key)
    assert difference(found, "kappa", below, above) == "-0.990"
    assert difference(found, "kappa", above, below) == "+0.990"
    assert difference(found, "kappa", below, ("replay", *below[1:])) == "–"
    noisy = [row("refresh", s, v) for s, v in enumerate((1.0, 3.0, 1.5))] + rows[3:]
    assert difference(Results(("sequential",), tuple(noisy)), "kappa", below, above) == "-0.167 ≈"
    lost = [row("refresh", s, v) for s, v in enumerate((1.0, float("nan"), 1.5))] + rows[3:]
    assert difference(Results(("sequential",), tuple(lost)), "kappa", below, above) == "+nan (undefined)"


def test_derivatives_are_those_of_the_anchor_of_the_moment(tmp_path, monkeypatch):
    """An adaptive picture frees its old models while it trains, and Python gives their places to new ones."""
    from benchmarks.experiments.sources.grid import configs
    from benchmarks.experiments.sources.run import run
    from benchmarks.experiments.sources.watcher import Watcher

    looked = []

    def spy(self, picture, number, risk, original=Watcher._derivatives):
        found = original(self, picture, number, risk)
        looked.append(float((found.anchor - risk.anchor).abs().max()))
        return found

    monkeypatch.setattr(Watcher, "_derivatives", spy)
    config = configs(quick=True)[0]
    pictures = [p for p in configs(quick=False)[0].pictures if p.policy_name == "adaptive"][4:10]
    setting = replace(config.setting, experiences=4, steps=30, every=5)
    run(replace(config, pictures=tuple(pictures), setting=setting), 0, Context(0, True, None, Path(tmp_path)))
    assert len(looked) > 50
    assert max(looked) == 0


def test_a_report_of_few_results_says_what_it_has(tmp_path):
    names = {"policy": "refresh", "kind": "GGN", "structure": "low rank"}
    row = {"metric": "error", "label": "replay", "seed": 0, "step": None, "value": 0.25, **names}
    assert "| low rank, refresh | 0.250 |" in report(Results(("replay",), (row,)), tmp_path).replace("  ", "")
