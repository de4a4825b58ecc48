"""What each choice of λ trains, on which images, and what the report says of it."""

import math

import pytest
import torch

from avalanche_curv import CurvatureEWCPlugin
from benchmarks.experiments.strengths import experiment as strengths
from benchmarks.experiments.strengths.experiment import Config, Given, OnFirst, StrengthsOptions
from benchmarks.experiments.strengths.report import report

QUICK = StrengthsOptions(quick=True)


def setting_of(scenario):
    return next(c.setting for c in strengths.experiment.configs(QUICK) if c.setting.scenario == scenario)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_held_out_images_are_not_trained_on(scenario):
    train, held, test = strengths.tasks_of(setting_of(scenario), 0, None)
    assert len(train) == len(held) == len(test) == 3
    for part, other in zip(train, held):
        rows = {row.numpy().tobytes() for row in part.inputs}
        assert not rows & {row.numpy().tobytes() for row in other.inputs}
    assert all(set(part.targets.tolist()) >= set(other.targets.tolist()) for part, other in zip(train, held))


def test_a_choice_on_the_first_tasks_costs_what_it_trains(results_of):
    setting = setting_of("task")
    configs = [Config("one", setting, OnFirst(2), "first"), Config("two", setting, Given(3.0), "3")]
    found = results_of(strengths.experiment, configs)
    given, first = found.of(["two"]), found.of(["one"])
    assert given.final("trained").mean == 1
    assert given.final("log_strength").mean == pytest.approx(math.log10(3))
    tried = (first.final("trained").mean * 3 - 1) / 2  # strengths of two tasks each, and one task more
    assert tried in (2, 3, 4, 5)


def test_a_given_strength_trains_as_the_plugin_does_by_itself():
    setting = setting_of("class")
    train, _, _ = strengths.tasks_of(setting, 0, None)
    found = strengths._stream(setting, train)
    tasks = [*found.benchmark.train_stream]
    learned = Given(2.0).train(lambda s: strengths.build(setting, s, found, 0), tasks, [])
    strategy = strengths.build(setting, 0.0, found, 0)
    (plugin,) = (one for one in strategy.plugins if isinstance(one, CurvatureEWCPlugin))
    plugin.strength = 2.0
    strategy.train(found.benchmark.train_stream)
    for a, b in zip(learned.strategy.model.parameters(), strategy.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_tuning_uses_seeds_of_its_own():
    assert {c.first_seed for c in strengths.experiment.configs(StrengthsOptions(quick=True, part="tune"))} == {1000}
    assert {c.first_seed for c in strengths.experiment.configs(QUICK)} == {0}


def test_the_terms_of_the_evidence_add_up(results_of, tmp_path):
    configs = strengths.experiment.configs(StrengthsOptions(quick=True, part="evidence"))
    found = results_of(strengths.experiment, [c for c in configs if c.setting.scenario == "class" and c.name == "10"])
    whole, *terms = (found.final(metric).mean for metric in ("log_evidence", "fit", "prior", "volume"))
    assert whole == pytest.approx(sum(terms))
    assert max(terms) < 0
    assert found.final("determined").mean < found.final("directions").mean
    assert not found.select("accuracy/task_2")
    assert "| λ " in report(found, tmp_path)


def test_the_report_has_a_table_for_each_stream(results_of, tmp_path):
    configs = [c for c in strengths.experiment.configs(QUICK) if c.name == "by evidence"]
    written = report(results_of(strengths.experiment, configs), tmp_path)
    assert written.count("| λ chosen") == 3
    assert written.count("| by evidence") == 3
    assert (tmp_path / "strengths.png").exists()
