"""The estimators against paper, what every strength shares, and the report."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.experiments.fisher_estimators import experiment as fisher
from benchmarks.experiments.fisher_estimators.experiment import COMMON, ESTIMATORS, EXPONENTS, Config, Setting
from benchmarks.experiments.fisher_estimators.report import curves, level_of, report, works
from benchmarks.harness import Summary

SMALL = Setting("digits", tasks=3, hidden=10, steps=15, batch=32, rate=1e-2)


def configs(*strengths):
    """Naive, and all estimators at some strengths."""
    return [
        Config("Naive", "Naive", SMALL),
        *(
            Config(f"{name} at {strength:g}", name, SMALL, estimator, strength)
            for name, estimator in ESTIMATORS.items()
            for strength in strengths
        ),
    ]


@pytest.fixture(scope="module")
def results(results_of):
    """One seed of all estimators at two strengths."""
    return results_of(fisher.experiment, configs(10.0, 1000.0))


def value(results, metric, label):
    return results.final(metric, label).mean


def test_a_sure_network_has_an_empirical_fisher_smaller_by_the_probability_of_the_wrong_label():
    """With f the difference of the two logits and p the probability of the wrong label, an example has the exact
    diagonal p (1 − p) (∇f)² and the empirical one p² (∇f)²."""
    from avalanche_curv.core import Diagonal, EmpiricalFisher, EmpiricalRisk, Fisher, Past

    model = nn.Linear(3, 2)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    outputs = model(inputs).detach()
    right = outputs.argmax(1)
    wrong = outputs.softmax(1).gather(1, 1 - right[:, None]).squeeze(1)
    squares = 2 * (inputs.square().sum(1) + 1)  # of ∇f: each input and 1 for the bias, once for each of the logits
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs, right)])
    traces = {}
    for kind in (Fisher(), EmpiricalFisher()):
        watched = fisher.Watched(None, 0)
        watched.absorb(Past(), risk, kind, Diagonal())
        traces[type(kind)] = watched.scalars()["trace"]
    assert traces[Fisher] == pytest.approx(float((wrong * (1 - wrong) * squares).mean()), rel=1e-5)
    assert traces[EmpiricalFisher] == pytest.approx(float((wrong**2 * squares).mean()), rel=1e-5)


def test_fishers_are_summed_at_the_newest_anchor_each_of_so_many_examples():
    from avalanche_curv.core import Diagonal, EmpiricalRisk, Fisher, Past, estimate
    from avalanche_curv.core.risk.batches import random_part

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)) for _ in range(2)]
    past, watched, expected = Past(), fisher.Watched(7, seed=5), 0.0
    for number, (inputs, targets) in enumerate(data):
        model = nn.Linear(3, 2)
        whole = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs, targets)])
        past = watched.absorb(past, whole, Fisher(), Diagonal())
        at = random_part(20, 7 / 20, 5 * 1_000_003 + number)
        assert len(at) == 7
        part = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs[at], targets[at])])
        expected = expected + estimate(Fisher(), Diagonal(), part).curvature.values
    torch.testing.assert_close(past.model.curvature.values, expected)
    assert past.model.gradient is None
    torch.testing.assert_close(past.model.anchor, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_tasks_are_pairs_of_all_ten_digits_and_carry_their_labels():
    from benchmarks.data import read

    found = fisher.stream(Setting("digits"), 3, None)
    images, _ = read("digits", 60_000, 0, None)
    assert sum(map(len, found.parts)) == len(images.targets)
    for task, (part, experience) in enumerate(zip(found.parts, found.benchmark.train_stream)):
        assert experience.task_labels == [task]
        inputs, targets, labels = part.__getitems__([4, 0])
        assert [(x.tolist(), y) for x, y in (part[4], part[0])] == list(zip(inputs.tolist(), targets.tolist()))
        assert labels.tolist() == [task, task]
        assert set(part.targets.tolist()) == {0, 1}


def test_the_first_task_is_the_same_at_every_strength_and_later_ones_are_not(results):
    def after(task, label):
        return [row["value"] for row in results.select("accuracy/experience_0", label) if row["step"] == task]

    assert len({tuple(after(1, label)) for label in results.labels}) == 1
    for name in ("exact", "empirical"):
        assert value(results, "trace", f"{name} at 10") == value(results, "trace", f"{name} at 1000")
    assert len({value(results, "average_accuracy", label) for label in results.labels}) > 3


def test_a_penalty_too_weak_to_matter_changes_nothing_but_past_heads_which_adam_goes_on_to_move():
    ends = []
    for strength in (None, 1e-12):
        config = replace(configs(1.0)[0 if strength is None else 1], strength=strength)
        found = fisher.stream(SMALL, 0, None)
        torch.manual_seed(0)
        trainer = fisher.build(config, found, fisher.Watched(None, 0))
        for experience in found.benchmark.train_stream:
            trainer.train(experience)
        ends.append(dict(trainer.strategy.model.named_parameters()))
    naive, weak = ends
    moved = {name for name in naive if not torch.equal(naive[name], weak[name])}
    assert moved == {f"heads.classifiers.{task}.classifier.{kind}" for task in (0, 1) for kind in ("weight", "bias")}


def test_an_estimator_works_from_where_its_accuracy_first_comes_to_the_level():
    def place(means, level):
        found = works({10.0**k: Summary(mean, None, 1) for k, mean in enumerate(means)}, level)
        return None if found is None else math.log10(found)

    assert place([0.5, 0.9, 0.9, 0.5], 0.8) == pytest.approx(0.75)
    assert place([0.5, 0.6, 0.5, 0.7], 0.6) == pytest.approx(1)
    assert place([0.9, 0.95], 0.8) is None  # already at the first strength tried
    assert place([0.5, 0.6], 0.8) is None
    assert place([0.9], 0.8) is None


def test_the_level_is_nine_tenths_of_what_the_best_gains_over_naive(results):
    naive = value(results, "average_accuracy", "Naive")
    best = max(value(results, "average_accuracy", label) for label in results.labels if label != "Naive")
    assert level_of(results, curves(results)) == pytest.approx(0.1 * naive + 0.9 * best)


def test_the_report_compares_every_estimator_with_the_exact_one(results, tmp_path):
    written = report(results, tmp_path)
    lines = {line.split("|")[1].strip(): line for line in written.splitlines() if line.startswith("| ")}
    assert {"exact", "exact, 500 examples", "one sampled label", "empirical", "batches of 128"} < set(lines)
    ratio = value(results, "trace", "exact at 10") / value(results, "trace", "batches of 128 at 10")
    cells = [cell.strip() for cell in lines["batches of 128"].split("|")]
    assert float(cells[8]) == pytest.approx(ratio, rel=0.06)
    accuracies = {at: value(results, "average_accuracy", f"batches of 128 at {at}") for at in ("10", "1000")}
    assert cells[2] == {"10": "10", "1000": "1e3"}[max(accuracies, key=accuracies.__getitem__)]
    assert f"{max(accuracies.values()):.4f}" in cells[3]
    assert (tmp_path / "fisher_estimators.png").exists()


def test_every_estimator_is_tried_at_one_common_strength():
    assert EXPONENTS.keys() == ESTIMATORS.keys()
    assert all(COMMON in {10.0**exponent for exponent in exponents} for exponents in EXPONENTS.values())


def test_labels_are_drawn_anew_with_each_seed():
    for name, estimator in ESTIMATORS.items():
        assert (estimator.seeded(1) != estimator.seeded(2)) == (name == "one sampled label")
        assert name == "one sampled label" or estimator.seeded(1) == estimator.curvature


def test_all_examples_are_taken_where_there_are_fewer():
    from avalanche_curv.core import Diagonal, EmpiricalRisk, Fisher, Past

    risk = EmpiricalRisk.snapshot(nn.Linear(2, 2), nn.CrossEntropyLoss(), [(torch.ones(4, 2), torch.zeros(4).long())])
    few, all_of_them = (fisher.Watched(count, 0).absorb(Past(), risk, Fisher(), Diagonal()) for count in (500, None))
    assert few.model.curvature.trace() == all_of_them.model.curvature.trace()
