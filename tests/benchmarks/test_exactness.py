"""Heads on features: where the sum of past losses is joint training, and how far from it everything else ends."""

import math
import re
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from avalanche_curv import Dense
from benchmarks.experiments.exactness.course import Errors, learned, of_sums, sequence
from benchmarks.experiments.exactness.experiment import ExactnessOptions, experiment
from benchmarks.experiments.exactness.learner import Head, Schedule, closed_form, joined, with_one
from benchmarks.experiments.exactness.report import Point, _order, _sentence, report
from benchmarks.experiments.exactness.rows import (
    FREE,
    GROWS,
    JOINT,
    KEPT,
    MEANS,
    PAIR,
    REPLAY,
    RIDGE,
    SLOPES,
    SOFTMAX,
    SQUARED,
    Config,
    Setting,
    best_strengths,
    grid,
    settings,
)
from benchmarks.harness import Results
from benchmarks.streams.features import Features, RandomReLU

FEATURES = Features("digits", RandomReLU(width=24), 100, 30)
TEN = Setting("digits", FEATURES, 8, 100, tasks=10)
FIVE = replace(TEN, tasks=5, schedule=Schedule(10, 32, iterations=60))


def config(setting, head, method, **more):
    return Config("", setting, head, method, **more)


@pytest.mark.parametrize("structure", [Dense(), PAIR], ids=str)
@pytest.mark.parametrize(("policy", "seeds"), [(SLOPES, 1), ("merge", 1), (GROWS, 2)])
def test_without_an_example_of_the_past_a_linear_head_with_squared_error_is_joint_training(structure, policy, seeds):
    (row,) = grid(TEN, [SQUARED], {"kept": structure}, [policy])
    for seed in range(seeds):
        tasks, (x, y) = sequence(TEN, seed, None, torch.float64)
        model, errors, _ = learned(row, tasks, seed)
        outputs, joint = model(x).detach(), with_one(x) @ closed_form(tasks, TEN.weight)
        torch.testing.assert_close(outputs, joint, rtol=0, atol=1e-8)
        assert (outputs.argmax(1) == y).double().mean() == (joint.argmax(1) == y).double().mean()
        assert errors.measures()["error"] < 1e-9


def test_the_closed_form_is_where_the_loss_of_all_tasks_has_no_slope():
    tasks, _ = sequence(TEN, 0, None, torch.float64)
    weights = closed_form(tasks, 0.1).requires_grad_()
    fit = [(with_one(x) @ weights - F.one_hot(y, 10).double()).square().sum(1).mean() for x, y in tasks]
    (slope,) = torch.autograd.grad(sum(fit) + 0.05 * weights.square().sum(), weights)
    assert slope.abs().max() < 1e-10


def test_without_slopes_each_anchor_is_taken_for_a_minimum_and_the_sum_is_not_joint_training():
    (row,) = grid(TEN, [SQUARED], {"kept": PAIR}, ["accumulate"])
    tasks, (x, _) = sequence(TEN, 0, None, torch.float64)
    model, errors, _ = learned(row, tasks, 0)
    assert (model(x) - with_one(x) @ closed_form(tasks, TEN.weight)).abs().max() > 0.1
    assert errors.measures()["error"] > 0.1


def test_the_ridge_regression_of_scikit_learn_is_the_closed_form():
    tasks, (x, y) = sequence(FIVE, 1, None, torch.float64)
    joint = ((with_one(x) @ closed_form(tasks, FIVE.weight)).argmax(1) == y).double().mean()
    assert of_sums(config(FIVE, SQUARED, RIDGE), joined(tasks), (x, y), 1) == joint
    means = torch.stack([joined(tasks)[0][joined(tasks)[1] == c].mean(0) for c in range(10)])
    nearest = (torch.cdist(x, means).argmin(1) == y).double().mean()
    assert of_sums(config(FIVE, SQUARED, MEANS), joined(tasks), (x, y), 1) == nearest


def test_tasks_have_classes_as_they_come_and_tuning_tests_on_training_examples():
    tasks, (_, tested) = sequence(FIVE, 3, None, torch.float64)
    assert [y.unique().tolist() for _, y in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert tested.bincount().tolist() == [30] * 10
    domain, (_, tested) = sequence(replace(FIVE, domain=True), 3, None, torch.float64)
    assert [y.unique().tolist() for _, y in domain] == [[0, 1]] * 5
    assert tested.bincount().tolist() == [150, 150]
    fewer, (held_out, _) = sequence(replace(FIVE, held_out=0.1), 3, None, torch.float64)
    assert (len(held_out), sum(len(y) for _, y in fewer)) == (100, 900)
    whole = torch.cat([x for x, _ in tasks])
    assert (torch.cdist(held_out, whole).min(1).values < 1e-6).all()


def test_replay_has_as_many_bytes_as_a_pair_of_factors_and_learns_from_them():
    tasks, _ = sequence(FIVE, 0, None, torch.float64)
    _, errors, size = learned(config(FIVE, SQUARED, REPLAY), tasks, 0)
    pair = 8 * (9**2 + 10**2 + 3 * 90)  # A, G, and of each parameter a diagonal, an anchor and a slope
    assert 0.8 * pair < size <= pair
    assert len(errors.predicted) == 4


def test_joint_training_of_other_heads_takes_the_steps_of_all_tasks():
    tasks, (x, y) = sequence(FIVE, 0, None, torch.float64)
    model, _, _ = learned(config(replace(FIVE, schedule=Schedule(iterations=300)), SOFTMAX, JOINT), tasks, 0)
    weight = FIVE.weight / 5
    loss = F.cross_entropy(model(joined(tasks)[0]), joined(tasks)[1])
    loss = loss + 0.5 * weight * sum(parameter.square().sum() for parameter in model.parameters())
    slopes = torch.autograd.grad(loss, [*model.parameters()])
    assert max(slope.abs().max() for slope in slopes) < 1e-3
    assert (model(x).argmax(1) == y).double().mean() > 0.5


def test_a_model_that_is_wrong_has_an_error_between_zero_and_one():
    assert Errors([1.0, -1.0], [1.0, -1.0]).measures()["error"] == 0
    assert Errors([1.0], [-1.0]).measures()["error"] == 1
    assert Errors().measures() == {}


def test_the_sentence_says_what_a_reader_can_count():
    points = [Point("", "merge", *pair) for pair in [(1e-4, 0.0), (0.2, 0.1), (0.9, 0.5), (0.9, 0.3)]]
    assert _sentence(points) == (
        "Of 4 rows at λ = 1, the 1 whose error is below 0.01 lose at most 0.0000 of accuracy, the 1 between 0.01 and "
        "0.5 lose 0.100 to 0.100, 0.100 in the median, the 2 above 0.5 lose 0.300 to 0.500, 0.500 in the median."
    )
    lost = [0.2, 0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 0.9]  # two pairs of ten swapped: 1 - 6 * 4 / (10 * 99) = 0.976
    points = [Point("", "merge", 0.01 * (i + 1), loss) for i, loss in enumerate(lost)]
    points += [Point("", "refresh", 0.5, 0.01 * i) for i in range(9)]
    assert re.search(r"0\.98 \[0\.\d\d, 1\.00\] of those that store no example \(10\)", _sentence(points))
    assert "that store a tenth" not in _sentence(points)  # too few


def test_the_interval_of_a_rank_correlation_is_that_of_fishers_transform():
    x, noise = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).tolist()
    losses = [0.6 * a + 0.8 * b for a, b in zip(x, noise)]
    known = spearmanr(x, losses).statistic
    half = 1.96 * ((1 + known**2 / 2) / 197) ** 0.5  # Bonett & Wright 2000
    found = [float(part) for part in re.findall(r"[0-9.]+", _order([Point("", "", *p) for p in zip(x, losses)]))]
    assert found == pytest.approx([known, *(math.tanh(math.atanh(known) + side) for side in (-half, half))], abs=0.03)


def test_the_grid_asks_for_what_the_issue_names_at_one_and_tuned_strengths():
    configs = experiment.configs(ExactnessOptions(strengths=(("x", 1.0),)))
    kept = [one for one in configs if one.method == KEPT]
    assert len([one for one in kept if not one.tuned]) >= 60
    assert {one.kept for one in kept} == {"Dense", "Kronecker", "EKFAC", "low rank", "diagonal"}
    assert {one.kept_by for one in kept} >= {*FREE, "refresh", "adaptive", GROWS}
    assert sorted({setting.tasks for setting in settings(ExactnessOptions())}) == [5, 10, 50]
    assert all(one.strength == 1 for one in kept if not one.tuned)


def test_the_best_strength_is_the_smallest_of_equal_ones():
    tried = {1.0: 0.5, 10.0: 0.7, 100.0: 0.7}
    rows = tuple(
        {"metric": "accuracy", "step": None, "value": value, "label": f"row at {strength:g}", "seed": 0}
        for strength, value in tried.items()
    )
    headers = tuple(
        {"label": row["label"], "seed": 0, "config": {"strength": strength}} for row, strength in zip(rows, tried)
    )
    assert best_strengths(Results(tuple(row["label"] for row in rows), rows, headers)) == {"row": 10.0}


def test_the_report_has_its_tables_and_its_figure(results_of, tmp_path):
    configs = [one for one in experiment.configs(ExactnessOptions(quick=True)) if not one.head.hidden]
    written = report(results_of(experiment, configs), tmp_path)
    assert "## Where the model is exact" in written
    assert f"Kronecker, {GROWS}" in written
    assert "rows at λ = 1, " in written
    assert (tmp_path / "exactness.png").exists()


def test_a_hidden_head_is_drawn_by_its_seed_and_leaves_the_random_state():
    head, state = Head("", hidden=(3,)), torch.get_rng_state()
    assert torch.equal(head.build(4, 10, 1)[0].weight, head.build(4, 10, 1)[0].weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p.any() for p in SQUARED.build(4, 10, 1).parameters())
