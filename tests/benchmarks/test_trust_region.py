"""Replay of a memory against paper, the grid of the trust region experiment, and its report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import AdaptiveRefresh, CurvatureEWCPlugin, Diagonal, Fisher
from benchmarks.experiments.trust_region.experiment import (
    EWC,
    SETTINGS,
    STRENGTHS,
    TrustRegionOptions,
    experiment,
    points,
    rows,
    settings,
)
from benchmarks.experiments.trust_region.frontier import WithReplay
from benchmarks.experiments.trust_region.report import closed, report
from benchmarks.experiments.tune.experiment import TARGETS
from benchmarks.harness import Context, Results, UsageError
from benchmarks.methods import MemoryReplay


def results(values):
    """Results on the sine stream from {method: {seed: accuracy}}."""
    setting = {"stream": "sine", "experiences": 2, "steps": 1, "batch": 1, "rate": 0.1, "memory": 0.1}
    records = tuple(
        {"metric": "average_accuracy", "label": name, "seed": seed, "step": None, "value": value}
        for name, own in values.items() for seed, value in own.items()
    )
    headers = tuple(
        {"label": name, "seed": 0, "config": {"name": name, "method": {}, "setting": setting, "tolerance": 0.1}}
        for name in values
    )
    return Results((*values, "not finished"), records, headers)


def test_replay_of_a_memory_adds_the_mean_loss_of_each_past_task(learner, plane):
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
        "refresh per task": {0: 0.6, 1: 0.6},
        "refresh per task, slope": {0: 0.5, 1: 0.9},
        "replay": {0: 0.9, 1: 0.9},
        "adaptive 0.1": {0: 0.8, 1: 0.9},
    })
    assert closed(found, "adaptive 0.1") == pytest.approx((0.85 - 0.7) / (0.9 - 0.7))
    assert closed(found, "replay") == pytest.approx(1)
    assert closed(found, "adaptive 0.2") is None


def test_a_report_of_few_results_says_what_it_has(tmp_path):
    written = report(results({"adaptive 0.1": {0: 0.8}, "replay": {}}), tmp_path)
    assert "| adaptive 0.1 | **0.800** |" in written
    assert "not finished" not in written
    assert (tmp_path / "trust_region.png").exists()


def test_every_method_that_is_tuned_has_a_strength_within_its_grid():
    found = {stream: {config.name: config for config in rows(setting, False)} for stream, setting in SETTINGS.items()}
    tried = {(stream, name): TARGETS["trust_region"].tried(config)
             for stream, configs in found.items() for name, config in configs.items()}
    assert {row for row, strengths in tried.items() if strengths} == STRENGTHS.keys()
    for (stream, name), strength in STRENGTHS.items():
        assert min(tried[stream, name]) < strength < max(tried[stream, name])
        assert found[stream][name].method.strength == strength
    assert 1e6 in tried["sine", EWC]
    configs = found["sine"]
    assert next(name for name in configs if name.startswith("adaptive")) == "adaptive 1"
    assert configs["adaptive 0.1, at most 3"].method.policy.max_refreshes == 3
    assert [c.tolerance for c in configs.values() if c.tolerance] == [1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02]


def test_mnist_is_asked_for_by_name_only_with_its_place():
    with pytest.raises(UsageError, match="stream 'split_mnist' reads MNIST: give --dataset-root DIR"):
        settings(TrustRegionOptions(stream="split_mnist"))
    assert [s.stream for s in settings(TrustRegionOptions())] == ["sine", "split_digits", "permuted_digits"]


def test_one_run_counts_its_refreshes(tmp_path):
    options = TrustRegionOptions(quick=True, stream="split_digits")
    config = next(c for c in experiment.configs(options) if c.label == "split_digits, adaptive 0.1")
    config = replace(config, setting=replace(config.setting, steps=40))
    records = {r["metric"]: r["value"] for r in experiment.run(config, 0, Context(0, True, None, tmp_path))}
    assert records["refreshes"] >= 1
    assert 0 < records["average_accuracy"] <= 1
    assert records["stored_bytes"] > 0


def test_the_frontier_asks_for_mnist_and_has_each_method_at_each_memory_and_budget():
    with pytest.raises(UsageError, match="--part frontier reads MNIST: give --dataset-root DIR, or --quick"):
        points(TrustRegionOptions(part="frontier"))
    with pytest.raises(UsageError, match="leave --stream out"):
        points(TrustRegionOptions(part="frontier", stream="sine"))
    (replay, adaptive, both) = points(TrustRegionOptions(part="frontier", quick=True))
    assert replay.label == "Replay, 200 images, 10 steps"
    assert [round(one.method.fraction * 1440) for one in (replay,)] == [200]
    assert both.method.policy == adaptive.method.policy
    found = points(TrustRegionOptions(part="frontier", dataset_root=Path("anywhere")))
    assert len({one.label for one in found}) == len(found) == 27
    assert experiment.variant(TrustRegionOptions(part="frontier")) == "frontier"


def test_both_replays_the_examples_that_the_policy_stores(net, learner, plane):
    policy = AdaptiveRefresh(fraction=0.25)
    ewc, replay = WithReplay(1.0, Fisher(samples=1), Diagonal(), policy).plugins(144)
    strategy = learner(net, ewc, replay)
    for experience in plane.train_stream:
        strategy.train(experience)
    stored = torch.cat([inputs for risk in ewc.past.stored for inputs, _ in risk.batches])
    torch.testing.assert_close(torch.stack([item[0] for item in replay.storage_policy.buffer]), stored)


def test_the_report_of_the_frontier_divides_times_seed_by_seed(tmp_path):
    setting = {"stream": "split_mnist", "experiences": 5, "steps": 30, "batch": 64, "rate": 0.001}
    values = {"Replay": {0: 1.0, 1: 2.0}, "adaptive refresh": {0: 3.0, 1: 4.0}}
    records = tuple(
        {"metric": metric, "label": name, "seed": seed, "step": None, "value": scale * seconds}
        for name, own in values.items() for seed, seconds in own.items()
        for metric, scale in (("processor_seconds", 1.0), ("average_accuracy", 0.2), ("stored_bytes", 1024.0))
    )
    headers = tuple(
        {"label": name, "seed": 0, "config": {"name": name, "images": 200, "method": {}, "setting": setting}}
        for name in values
    )
    written = report(Results((*values,), records, headers), tmp_path)
    assert "| 200    |    30 | adaptive refresh" in written.replace("|    200 |", "| 200    |")
    assert "2.50" in written
    assert {path.name for path in tmp_path.iterdir()} == {"frontier_seconds.png", "frontier_bytes.png"}
