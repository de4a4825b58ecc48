"""The path changes a factor at a time, what its rows stand for, and the report."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.experiments.ewc_permuted_mnist import experiment as ewc
from benchmarks.experiments.ewc_permuted_mnist.experiment import Adam, Config, EwcOptions, Setting, Sgd
from benchmarks.experiments.ewc_permuted_mnist.report import report
from benchmarks.harness.experiment import describe
from benchmarks.methods import AvalancheEWC, Multitask, Plain

SMALL = Setting(Sgd(0.05), "digits", tasks=2, hidden=10, steps=50, batch=32)


@pytest.fixture(scope="module")
def grid():
    """The path, and the rows beside it."""
    return ewc.penalised()


def test_each_row_of_the_path_changes_one_thing_beside_its_strength(grid):
    path, aside = grid

    def changes(one, other):
        of_setting = {f.name for f in fields(Setting) if getattr(one.setting, f.name) != getattr(other.setting, f.name)}
        pixels = {"mean", "deviation"}
        names = ("curvature", "structure")
        of_row = {name for name in names if getattr(one.method, name) != getattr(other.method, name)}
        return (of_setting - pixels) | ({"pixels"} if of_setting & pixels else set()) | of_row

    found = [changes(above, row) for above, row in pairwise(path)]
    assert found == [{"optimiser"}, set(), {"curvature"}, {"pixels"}, {"optimiser"}, {"structure"}]
    above = next(row for row in path if row.label == "6 optimiser")
    assert [changes(above, row) for row in aside] == [{"pixels"}, {"hidden"}, {"steps"}]
    for row in path:
        assert not row.tried or row.method.strength in row.tried


def test_the_first_row_is_what_avalanche_does(grid):
    """The squares of mini-batch gradients, at twice the strength for the ½."""
    ours = grid[0][0].method.with_strength(500 * ewc.THEIRS)
    kind = replace(ours.curvature, batch_size=SMALL.batch)
    ours = replace(ours, curvature=kind, policy=replace(ours.policy, fraction=1.0))
    found = []
    for method in (ours, AvalancheEWC(500.0), AvalancheEWC(0.0)):
        stream = ewc.stream(SMALL, 0, None, at_once=False)
        torch.manual_seed(5)
        trainer = ewc.build(Config("one", method, SMALL), stream)
        for task, experience in enumerate(stream.benchmark.train_stream):
            torch.manual_seed(task)  # the loader of Avalanche's own estimate draws from the global state
            trainer.train(experience)
        found.append(torch.cat([p.detach().flatten() for p in trainer.strategy.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert (found[1] - found[2]).abs().max() > 1e-2


def test_adam_in_one_kernel_steps_as_adam_does():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 5, generator=generator)
    ends = []
    for make in (Adam(1e-2).of, lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, fused=False)):
        model = nn.Linear(5, 1)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = make(model)
        for _ in range(50):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends)


def test_pixels_lie_between_0_and_1_or_are_shifted_and_scaled():
    plain, shifted = (
        ewc.stream(replace(SMALL, mean=mean, deviation=deviation), 0, None, at_once=False).parts[0].inputs
        for mean, deviation in ((0.0, 1.0), (0.5, 0.25))
    )
    assert (plain.min(), plain.max()) == (0, 1)
    torch.testing.assert_close(shifted, (plain - 0.5) * 4)


def test_weights_that_diverge_end_the_run_without_an_accuracy(grid, results_of):
    row = replace(grid[0][3], setting=replace(SMALL, optimiser=Sgd(1e30), tasks=3))
    (found,) = results_of(ewc.experiment, [replace(row, method=row.method.with_strength(1e6)).config()]).rows
    assert found["metric"] == "average_accuracy"
    assert math.isnan(found["value"])


def test_multitask_has_the_steps_of_all_tasks(results_of):
    config, joint = Config("multitask", Multitask(), SMALL), ewc.stream(SMALL, 0, None, at_once=True)
    trainer = ewc.build(config, joint)
    trainer.train(joint.benchmark.train_stream[0])
    assert trainer.strategy.clock.train_iterations == SMALL.steps * SMALL.tasks
    found = results_of(ewc.experiment, [config])
    assert [row["step"] for row in found.select("accuracy/seen")] == [SMALL.tasks]


def test_a_long_stream_is_tested_ten_times_with_the_same_end(results_of, monkeypatch):
    config = Config("long", Plain(), replace(SMALL, tasks=21, steps=2))
    seldom = results_of(ewc.experiment, [config])
    monkeypatch.setattr(Setting, "looks", 1)
    always = results_of(ewc.experiment, [config])
    for metric in ("average_accuracy", "learned", "forgetting"):
        assert seldom.final(metric) == always.final(metric)
    assert [row["step"] for row in seldom.select("accuracy/seen")] == [1, *range(2, 21, 2), 21]
    assert len(always.select("accuracy/seen")) == 21


@pytest.mark.parametrize("part", ewc.PARTS)
def test_every_part_has_a_quick_form_without_data_and_tunes_on_seeds_of_its_own(part):
    configs = ewc.experiment.configs(EwcOptions(quick=True, part=part))
    assert {config.setting.images for config in configs} == {"digits"}
    assert {config.first_seed for config in configs} == {1000 if part == "tune" else 0}
    assert len({str(describe(replace(config, label=""))) for config in configs}) == len(configs)


def test_the_report_says_what_each_row_changes_and_which_reach_the_paper(results_of, tmp_path):
    chosen = ("1 Avalanche's recipe", "7 Kronecker", "multitask, as row 7")
    results = results_of(ewc.experiment, ewc.experiment.configs(EwcOptions(quick=True, row=chosen)))
    (final,) = results.where(changed="KFAC for the diagonal, λ tuned").select("average_accuracy")
    final["value"] = 0.951
    written = report(results, tmp_path)
    assert "KFAC for the diagonal" in written
    assert "At or above 0.94: 7 Kronecker (0.9510)." in written
    assert {path.name for path in tmp_path.glob("*.png")} == {"ewc_permuted_mnist.png", "ewc_permuted_mnist_rows.png"}


def test_tuning_tests_on_training_images_that_it_does_not_train_on():
    (config,) = (c for c in ewc.rows("tune") if c.label == "4 per-example Fisher at 3")
    setting = replace(config.setting, images="digits", tasks=2)
    found = ewc.stream(setting, 1000, None, at_once=False)
    whole = ewc.stream(replace(setting, validation=0.0), 1000, None, at_once=False)

    def images(part):
        return sorted(row.numpy().tobytes() for row in part.inputs)

    assert images(found.parts[0]) != images(whole.parts[0])
    assert sorted(images(found.parts[0]) + images(found.tests[0])) == images(whole.parts[0])
    assert len(found.tests[0]) == round(0.1 * len(whole.parts[0]))
