"""Replay of a memory against paper, the grid of the trust region experiment, and its report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.experiments.trust_region import SETTINGS, Config, TrustRegionOptions, experiment, settings
from benchmarks.experiments.trust_region.report import closed, report, slowdown
from benchmarks.harness import UsageError
from benchmarks.harness.experiment import Context
from benchmarks.harness.results import Results


def results(values, metric="average_accuracy"):
    """Results from {label: {seed: value}}."""
    rows = tuple(
        {"metric": metric, "label": label, "seed": seed, "step": None, "value": value}
        for label, own in values.items() for seed, value in own.items()
    )
    return Results(tuple(values), rows)


def test_replay_of_a_memory_adds_the_mean_loss_of_each_past_task(learner, plane):
    from benchmarks.methods import MemoryReplay

    (plugin,) = MemoryReplay(2.0, 0.25).plugins(0)
    model = nn.Linear(2, 2)
    strategy = learner(model, plugin, train_mb_size=48)
    added = []

    def spy(strategy, **kwargs):
        before = strategy.loss
        type(plugin).before_backward(plugin, strategy, **kwargs)
        added.append((float((strategy.loss - before).detach()), [p.detach().clone() for p in model.parameters()]))

    plugin.before_backward = spy
    for experience in plane.train_stream:
        strategy.train(experience)
    assert added[0][0] == 0
    value, (weight, bias) = added[-1]
    expected = sum(float(cross_entropy(x @ weight.T + bias, y)) for x, y in plugin.memory[:2])
    assert value == pytest.approx(2 * expected, rel=1e-5)
    assert [len(y) for _, y in plugin.memory] == [12, 12, 12]


def test_replay_stores_what_the_policies_store(net, learner, plane):
    from avalanche_curv import AdaptiveRefresh, CurvatureEWCPlugin
    from benchmarks.methods import MemoryReplay

    (replay,), ewc = MemoryReplay(1.0, 0.25).plugins(0), CurvatureEWCPlugin(1.0, policy=AdaptiveRefresh(fraction=0.25))
    strategy = learner(net, replay, ewc)
    for experience in plane.train_stream:
        strategy.train(experience)
    for (x, y), risk in zip(replay.memory, ewc.past.stored):
        ((own_x, own_y),) = risk.batches
        assert torch.equal(x, own_x)
        assert torch.equal(y, own_y)


def test_the_gap_is_measured_from_the_better_refresh_per_task_to_replay():
    found = results({
        "sine, refresh per task": {0: 0.6, 1: 0.6},
        "sine, refresh per task, slope": {0: 0.5, 1: 0.9},
        "sine, replay": {0: 0.9, 1: 0.9},
        "sine, adaptive 0.1": {0: 0.8, 1: 0.9},
    })
    assert closed(found, "sine", "adaptive 0.1") == pytest.approx((0.85 - 0.7) / (0.9 - 0.7))
    assert closed(found, "sine", "replay") == pytest.approx(1)
    assert closed(found, "sine", "adaptive 0.2") is None


def test_time_is_compared_seed_by_seed():
    found = results({"a": {0: 2.0, 1: 6.0}, "b": {0: 1.0, 1: 2.0, 2: 9.0}}, "seconds")
    assert slowdown(found, "a", "b") == pytest.approx((2 + 3) / 2)


def test_a_report_of_few_results_says_what_it_has(tmp_path):
    written = report(results({"sine, adaptive 0.1": {0: 0.8}, "sine, replay": {}}), tmp_path)
    assert "| adaptive 0.1 | **0.800** |" in written
    assert (tmp_path / "trust_region.png").exists()


def test_every_method_that_is_tuned_has_a_strength_within_its_grid():
    from benchmarks.experiments import tune
    from benchmarks.experiments.trust_region.grid import EWC, STRENGTHS, methods, penalised

    assert {(stream, name) for stream, name in STRENGTHS} == {
        (stream, name) for stream, setting in SETTINGS.items() for name in penalised(setting)
    }
    for (_, name), strength in STRENGTHS.items():
        tried = tune.TRUST_REGION_EWC_GRID if name == EWC else tune.TRUST_REGION_GRID
        assert min(tried) < strength < max(tried)
    rows = methods(SETTINGS["sine"], quick=False)
    assert next(row for row in rows if row.startswith("adaptive")) == "adaptive 1"
    assert rows["adaptive 0.1, at most 3"].policy.max_refreshes == 3


def test_mnist_is_asked_for_by_name_only_with_its_place():
    with pytest.raises(UsageError, match="stream 'split_mnist' reads MNIST: give --dataset-root DIR"):
        settings(TrustRegionOptions(stream="split_mnist"))
    assert [s.stream for s in settings(TrustRegionOptions())] == ["sine", "split_digits", "permuted_digits"]


def test_one_run_counts_its_refreshes(tmp_path):
    options = TrustRegionOptions(quick=True, stream="split_digits")
    method = next(c.method for c in experiment.configs(options) if c.label == "split_digits, adaptive 0.1")
    config = Config("adaptive", method, replace(settings(options)[0], steps=40))
    records = {r["metric"]: r["value"] for r in experiment.run(config, 0, Context(0, True, None, Path(tmp_path)))}
    assert records["refreshes"] >= 1
    assert 0 < records["average_accuracy"] <= 1
    assert records["stored_bytes"] > 0
