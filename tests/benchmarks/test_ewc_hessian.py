"""The matrices of the comparison against paper and against each other, its data, its pairs and its report."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv import BatchedEmpiricalFisher, Diagonal, EmpiricalRisk, estimate
from benchmarks.experiments.ewc_hessian import experiment as ewc_hessian
from benchmarks.experiments.ewc_hessian.report import report
from benchmarks.experiments.tune import experiment as tune
from benchmarks.experiments.tune.report import report as tune_report
from benchmarks.harness import Context, Options, Results
from benchmarks.harness.experiment import describe
from benchmarks.pairs import paired
from benchmarks.streams import Stream

DATA = Path(__file__).parents[3] / "shared" / "data"
SMALL = {"stream": "permuted_digits", "experiences": 2, "hidden": 4, "steps": 3}


def test_the_squared_batch_gradient_shrinks_with_the_batch_at_a_minimum():
    """For y = ±1 around the fitted mean 0: g_i = ∓2, ḡ of B of them has E ḡ² = 4/B, and 0 for balanced batches."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    signs = torch.randint(2, (1600, 1), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.ones_like(signs), signs)])
    for size in (1, 4, 16):
        found = estimate(BatchedEmpiricalFisher(size), Diagonal(), risk).curvature.values
        assert found.item() == pytest.approx(4 / size, rel=0.3)


def marks(inputs, targets):
    """A number for each example, by which sets of them are compared: Avalanche sorts an experience by class."""
    weights = torch.randn(784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return inputs.flatten(1).double() @ weights + 1e4 * targets


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "MNIST" / "raw").is_dir(), reason=f"MNIST is not in {DATA}")
def test_the_stream_of_tensors_is_that_of_avalanche():
    from avalanche.benchmarks.classic import PermutedMNIST

    ours, theirs = ewc_hessian.permuted_mnist(2, 3, DATA), PermutedMNIST(2, seed=3, dataset_root=DATA)
    for own, other in zip(ours.tests, theirs.test_stream):
        inputs, targets, _ = zip(*other.dataset)
        expected = marks(torch.stack(inputs), torch.tensor(targets))
        torch.testing.assert_close(marks(*own).sort().values, expected.sort().values, rtol=0, atol=1e-3)
    inputs, targets, _ = zip(*(theirs.train_stream[0].dataset[i] for i in range(0, 60_000, 3_000)))
    far = torch.cdist(marks(torch.stack(inputs), torch.tensor(targets))[:, None], marks(*ours.first)[:, None])
    assert len(ours.first[1]) == 60_000
    assert (far.min(dim=1).values < 1e-3).all()


def test_a_paired_test_knows_what_is_on_paper():
    """Differences 1, 2, 3: t = 2 / (1/√3) = 2√3 with 2 degrees of freedom, p = 1 − t / √(t² + 2)."""
    pair = paired({0: 2.0, 1: 3.0, 2: 4.0, 9: 0.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (pair.difference.mean, pair.difference.std, pair.difference.n) == (2.0, 1.0, 3)
    assert pair.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert pair.verdict == "within noise"
    assert paired({s: 1 + 0.01 * s for s in range(5)}, dict.fromkeys(range(5), 0.0)).verdict == "beyond noise"
    assert paired({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).verdict == "identical"
    assert paired({0: 1.0}, {0: 2.0}).verdict == "one seed"
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Records of two methods on digits, by label."""
    found = {}
    for config in ewc_hessian.experiment.configs(Options(quick=True)):
        if config.label in ("Tanh, no penalty", "Tanh, Fisher"):
            small = replace(config, setting=replace(config.setting, **SMALL))
            context = Context(0, True, None, tmp_path_factory.mktemp("board"))
            runs = [list(ewc_hessian.experiment.run(small, 0, context)) for _ in range(2)]
            found[config.label] = small, runs
    return found


def values(records, metric):
    return [float(record["value"]) for record in records if record["metric"] == metric]


def test_a_run_depends_on_its_seed_alone(measured):
    for _, (first, second) in measured.values():
        assert values(first, "weights") == values(second, "weights")


def test_all_methods_share_the_first_experience_and_no_other(measured):
    plain, held = (runs[0] for _, runs in measured.values())
    assert values(plain, "accuracy/experience_0")[0] == values(held, "accuracy/experience_0")[0]
    assert values(plain, "weights") != values(held, "weights")


@pytest.mark.parametrize(("label", "figures"), [("Tanh, no penalty", ["seen"]), ("Tanh, Fisher", ["final", "seen"])])
def test_a_report_of_incomplete_results_is_written(measured, tmp_path, label, figures):
    labels = tuple(f"{a}, {name}" for a in ("ReLU", "Tanh") for name in ("no penalty", "Fisher", "Hessian"))
    config, runs = measured[label]
    rows = tuple({"step": None, **r, "value": float(r["value"]), "label": label, "seed": 0} for r in runs[0])
    header = {"label": label, "seed": 0, "config": describe(config)}
    written = report(Results(labels, rows, (header,), {"units": labels}), tmp_path)
    assert f"| {label} |" in written
    assert "ReLU, Fisher" not in written  # it has not finished
    assert ("| Tanh, empirical Fisher " in written) == (label == "Tanh, no penalty")  # its run compares the matrices
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == figures
    assert [f"({name}.png)" in written for name in figures] == [True] * len(figures)


def test_every_penalty_is_tuned_inside_its_grid_and_on_seeds_that_are_not_reported(monkeypatch):
    monkeypatch.setattr(Stream, "check", lambda *args: None)  # the grid needs no data
    options = tune.TuneOptions(quick=False, dataset_root=None, target="ewc_hessian")
    tried = {}
    for config in tune.experiment.configs(options):
        tried.setdefault(config.method, []).append(config.strength)
        assert config.inner.method.strength == config.strength
    for (activation, name), strength in ewc_hessian.STRENGTHS.items():
        grid = tried["ReLU, Fisher" if (activation, name) == ("ReLU", "Hessian") else f"{activation}, {name}"]
        assert min(grid) < strength < max(grid)
        assert strength in grid
    assert len(tried) == len(ewc_hessian.STRENGTHS) - 1

    class Recorder:
        def run(self, config, seed, context):
            return [{"metric": "average_accuracy", "value": seed}, {"metric": "other", "value": 0.0}]

    monkeypatch.setitem(tune.TARGETS, "ewc_hessian", replace(tune.TARGETS["ewc_hessian"], experiment=Recorder()))
    found = tune.experiment.run(tune.Config("ewc_hessian", "a", 1.0, None), 3, None)
    assert found == [{"metric": "accuracy", "value": tune.FIRST_SEED + 3}]


def test_the_best_strength_of_a_tuning_is_named():
    tried = {("m", 0.1): 0.5, ("m", 3.0): 0.7, ("m", 100.0): np.nan, ("other", 0.1): np.nan}
    configs = {tune.Config("refresh", *place, None): value for place, value in tried.items()}
    rows = tuple(
        {"metric": "accuracy", "label": config.label, "seed": k, "step": None, "value": value + k / 100}
        for config, value in configs.items() for k in (0, 1)
    )
    headers = tuple({"label": config.label, "seed": 0, "config": describe(config)} for config in configs)
    found = Results(tuple(config.label for config in configs), rows, headers)
    lines = tune_report(found, None).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines if line.startswith("|")}
    assert (cells["m"], cells["other"]) == ("3", "–")
