"""The comparison: what it trains and tests on, how it tunes, and what it says."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.experiments.compare.experiment import CompareOptions, experiment
from benchmarks.experiments.compare.report import _on_edges
from benchmarks.experiments.compare.run import build, course, data_for, run
from benchmarks.experiments.compare.setting import Setting
from benchmarks.experiments.tune_compare.experiment import Tuning, TuningOptions, best_strengths
from benchmarks.harness import Context, Results, UsageError
from benchmarks.harness.command import main
from benchmarks.harness.experiment import is_timing
from benchmarks.harness.tuning import FIRST_SEED
from benchmarks.methods import AllAtOnce, Plain, methods
from benchmarks.strategies import MAIN, STRATEGIES, chosen

SETTING = Setting("split_digits", "class", experiences=3, steps=4, batch=32, rate=3e-3, fidelity_every=0, test_limit=60)


def pixels(dataset):
    """The examples of a dataset as a set, each as the bytes of its pixels."""
    return {item[0].numpy().tobytes() for item in dataset}


def context(seed, folder):
    return Context(seed, False, None, folder)


def test_tuning_trains_and_tests_on_disjoint_parts_of_the_training_examples():
    whole, held = (
        data_for(replace(SETTING, test_limit=None, validation=part), 3, None).benchmark for part in (0.0, 0.2)
    )
    for number in range(3):
        train, valid = (pixels(stream[number].dataset) for stream in (held.train_stream, held.test_stream))
        assert train | valid == pixels(whole.train_stream[number].dataset)
        assert not train & valid
        assert not valid & pixels(whole.test_stream[number].dataset)
        counts = torch.bincount(torch.tensor([item[1] for item in held.test_stream[number].dataset]))
        wholes = torch.bincount(torch.tensor([item[1] for item in whole.train_stream[number].dataset]))
        assert counts[counts > 0].tolist() == (0.2 * wholes[wholes > 0]).int().tolist()


def test_the_first_k_protocol_sees_no_later_experience():
    (config,) = Tuning().configs(
        TuningOptions(stream="split_digits", strategy=("EWC",), protocol="first", first=2, quick=True)
    )

    found = data_for(config.setting, FIRST_SEED, None)
    assert len(found.benchmark.train_stream) == 2
    whole = data_for(replace(config.setting, experiences=5), FIRST_SEED, None)
    assert found.examples == whole.examples  # so that memories are as large as those that will be reported


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_accuracies_equal_a_count_over_the_test_examples(scenario, tmp_path):
    from avalanche.models import avalanche_forward

    setting = replace(SETTING, scenario=scenario)
    data = data_for(setting, 0, None)
    torch.manual_seed(0)
    trainer = build(Plain(), setting, data, context(0, tmp_path))
    list(course(trainer, data.benchmark, joint=False))
    counted = []
    model = trainer.strategy.model.eval()
    for experience in data.benchmark.test_stream:
        inputs, targets, labels = (torch.stack([torch.as_tensor(i) for i in part]) for part in zip(*experience.dataset))
        with torch.no_grad():
            outputs = avalanche_forward(model, inputs, labels)
        counted.append((outputs.argmax(1) == targets).double().mean().item())
    assert [len(row) for row in trainer.rows] == [1, 2, 3]
    assert trainer.rows[-1] == pytest.approx(counted, abs=1e-6)


def test_joint_training_is_measured_once_on_all(tmp_path):
    records = run(AllAtOnce(), SETTING, 0, context(0, tmp_path))
    measured = [record["metric"] for record in records if "experience" in record["metric"]]
    assert measured == [f"accuracy/experience_{number}" for number in range(3)]
    assert not {"forgetting", "learned"} & {record["metric"] for record in records}


@pytest.mark.parametrize("name", ["EWC", "CurvatureEWC Fisher, accumulate"])
def test_weights_that_diverge_have_no_accuracy(name, tmp_path):
    records = run(methods(SETTING.memory)[name].with_strength(1e42), SETTING, 0, context(0, tmp_path))
    assert [math.isnan(r["value"]) for r in records if r["metric"] == "average_accuracy"] == [True]


def test_two_runs_of_a_unit_with_one_seed_give_the_same_records(tmp_path):
    setting = replace(SETTING, experiences=2, steps=2, fidelity_every=1)
    for name in ("CurvatureEWC Fisher MC, refresh", "DER++"):
        method = methods(setting.memory)[name]
        first, second = (
            json.dumps([r for r in run(method, setting, 5, context(5, tmp_path)) if not is_timing(r["metric"])])
            for _ in range(2)
        )
        assert first == second


def row(name, strength, seed, value):
    label = f"{name} at {strength:g}"
    header = {"label": label, "seed": seed, "config": {"strategy": name, "strength": strength}}
    return header, {"metric": "average_accuracy", "value": value, "step": None, "label": label, "seed": seed}


def test_the_best_mean_is_chosen_and_of_equal_ones_the_smallest_strength():
    found = [
        row("A", 1.0, 0, 0.5), row("A", 1.0, 1, 0.7), row("A", 10.0, 0, 0.9), row("A", 10.0, 1, 0.2),
        row("B", 1.0, 0, 0.3), row("B", 10.0, 0, 0.3), row("B", 100.0, 0, float("nan")),
    ]
    headers, rows = zip(*found)
    results = Results(tuple(dict.fromkeys(h["label"] for h in headers)), rows, headers)
    assert best_strengths(results) == {"A": 1.0, "B": 1.0}


def test_a_method_that_diverges_at_every_strength_is_named():
    header, record = row("A", 1.0, 0, float("nan"))
    with pytest.raises(UsageError, match="'A' diverged at every strength that was tried"):
        best_strengths(Results((header["label"],), (record,), (header,)))


def test_the_baseline_joins_the_strategies_that_are_asked_for():
    found = experiment.configs(CompareOptions(stream="split_digits", strategy=("EWC",), baseline="Cumulative"))
    assert [config.label for config in found] == ["EWC", "Cumulative"]


def test_one_command_tunes_on_other_seeds_and_reports_at_the_strengths_it_found(tmp_path, capsys):
    words = ["run", "compare", "--stream", "split_digits", "--scenario", "domain", "--tune", "stream", "--quick"]
    chosen = ["--strategy", "EWC", "--strategy", "Naive", "--baseline", "EWC", "--seeds", "2", "--jobs", "1"]
    assert main([*words, *chosen, "--out", str(tmp_path)]) == 0
    strengths = json.loads((tmp_path / "tune_compare-split_digits-domain-quick" / "strengths.json").read_text())
    folder = tmp_path / "compare-split_digits-domain-tuned-stream-quick"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["options"]["strengths"] == [list(pair) for pair in strengths.items()] == [["EWC", 1.0]]
    assert "less EWC" in capsys.readouterr().out
    assert "held out" in (folder / "report.md").read_text()


def test_a_strength_at_an_end_of_its_grid_is_named():
    def one(name, strength, tuned_on):
        config = {"strategy": name, "method": {"strength": strength}, "tuned_on": tuned_on}
        return {"label": name, "seed": 0, "config": config}

    headers = (one("EWC", 1.0, "this stream"), one("EWC online", 10.0, "this stream"), one("SI fixed", 1.0, None))
    found = _on_edges(Results(tuple(header["label"] for header in headers), (), headers))
    assert found.endswith("perhaps better beyond it: EWC.")


def test_tuning_what_has_no_strength_is_left_out():
    assert experiment.prerequisite(CompareOptions(strategy=("Replay", "GPM"), tune="stream")) is None
    with pytest.raises(UsageError, match="Replay, GPM: without a strength, there is nothing to tune"):
        Tuning().configs(TuningOptions(strategy=("Replay", "GPM")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "first", "first": 1}, "'split_digits' can be tuned on its first 2 to 5 experiences"),
        ({"tune": "first", "first": 6}, "first 2 to 5 experiences"),
        ({"tune": "stream", "first": 2}, "for the protocol 'first'"),
        ({"first": 2}, "are for tuning: add --tune"),
        ({"tuning_seeds": 2}, "are for tuning: add --tune"),
        ({"quick": True, "steps": 9}, "leave --quick out, or --steps"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    def tuned():
        tuning, chosen = experiment.prerequisite(CompareOptions(**{"stream": "split_digits", **options}))
        return tuning.configs(chosen)

    with pytest.raises(UsageError, match=message):
        tuned()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": ("EWConline", "Naive")}, "did you mean 'EWC online'"),
        ({"strategy": ("Curv",)}, r"18 strategies begin with 'Curv':\n  Curv[^;]*them all: --strategy 'Curv\*'"),
        ({"strategy": ("X*",)}, "unknown strategy 'X\\*'"),
        ({"strategy": ("iCa*",), "scenario": "task"}, "none of iCaRL runs task-incrementally"),
        ({"strategy": ("",)}, "unknown strategy ''"),
        ({"strategy": ("Naive", "iCaRL"), "scenario": "task"}, "'iCaRL' does not run task-incrementally"),
        ({"strategy": ("ewc ONLINE",)}, "did you mean 'EWC online'"),
        ({"baseline": "Nave"}, "did you mean 'Naive'"),
        ({"baseline": "Naiv"}, "did you mean 'Naive'"),
        ({"stream": "sine", "scenario": "class"}, "has no scenario 'class'. It has: domain"),
    ],
)
def test_requests_that_cannot_be_met_name_the_remedy(options, message):
    for refuse in (experiment.check, experiment.configs):
        with pytest.raises(UsageError, match=message):
            refuse(CompareOptions(**{"stream": "split_digits", **options}))


def test_strategies_are_chosen_by_name_beginning_pattern_or_all():
    assert chosen("class", ["EWC", "Joint", "EWC"]) == ["EWC", "JointTraining"]
    merged = [name for name in STRATEGIES if name.startswith("CurvatureEWC") and name.endswith("merge")]
    assert chosen("class", ["Curv*merge"]) == merged
    assert len(merged) == 5
    assert chosen("class", ["all"]) == [*STRATEGIES]
    assert [*STRATEGIES.keys() - chosen("domain", ["all"])] == ["iCaRL"]
    assert chosen("class", []) == [*MAIN]
    assert chosen("task", []) == [name for name in MAIN if name != "DER++"]
