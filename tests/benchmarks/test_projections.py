"""Gradient projection memory against the paper's algorithm, loading by batches against Avalanche's, and the grid."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import EmpiricalRisk, Energy, GradientProjection, InputSpace, ProtectedSpace
from avalanche_curv.core.projection import Projector
from benchmarks.experiments.projections import experiment as projections
from benchmarks.experiments.projections.experiment import (
    GRIDS,
    MAIN,
    PARTS,
    STRENGTHS,
    TUNE,
    ProjectionsOptions,
    Setting,
    build,
    experiment,
    network,
    setting_for,
    stream,
)
from benchmarks.experiments.projections.report import report
from benchmarks.harness import UsageError
from benchmarks.harness.experiment import describe
from benchmarks.harness.tuning import FIRST_SEED
from benchmarks.streams.whole_batches import WholeBatches

THRESHOLDS = (0.95, 0.99, 0.99)
SMALL = Setting("digits", tasks=3, size=90, epochs=2, rate=0.05, hidden=40)


@pytest.fixture(scope="module")
def parts():
    """Three permutations of a few digits."""
    return stream(SMALL, 0, None, at_once=False)


def config(label, **options):
    return next(c for c in experiment.configs(ProjectionsOptions(quick=True, **options)) if c.label == label)


def test_gpm_is_algorithm_1_of_the_paper(parts):
    """Saha et al. 2021 in plain torch, by singular value decompositions of representation matrices (their eqs. 5 to 9),
    against `InputSpace` and `GradientProjection()`: the same spans and the same weights."""
    cuts = tuple(Energy(fraction, most_pairs=64) for fraction in THRESHOLDS)
    ours, theirs, space, bases = double_network(), double_network(), ProtectedSpace(), [None] * 3
    for part in parts.parts:
        inputs, targets = part.all()
        inputs = inputs.double()
        projector = Projector(space, GradientProjection())
        for x, y in zip(inputs.split(10), targets.split(10)):
            step(ours, x, y, projector.before_step)
            step(theirs, x, y, partial(project_gradients, bases=bases))
        space = space.absorb(EmpiricalRisk.snapshot(ours, nn.CrossEntropyLoss(), [(inputs, targets)]), InputSpace(cuts))
        bases = [grown(*known) for known in zip(bases, representations(theirs, inputs), THRESHOLDS)]
    for own, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
    for block, basis in zip(space.blocks.values(), bases):
        rows = block.subspace.rows
        assert 0 < len(rows) == basis.shape[1] < len(basis)
        torch.testing.assert_close(rows.T @ rows, basis @ basis.T, rtol=0, atol=1e-9)


def double_network():
    torch.manual_seed(0)
    return network(64, SMALL).double()


def step(model, inputs, targets, before):
    model.zero_grad()
    cross_entropy(model(inputs), targets).backward()
    before(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= SMALL.rate * parameter.grad


def project_gradients(model, bases):
    """∇W ← ∇W − ∇W M Mᵀ (eq. 6)."""
    for parameter, basis in zip(model.parameters(), bases):
        if basis is not None:
            parameter.grad -= parameter.grad @ basis @ basis.T


@torch.no_grad()
def representations(model, inputs):
    """R, the inputs of each layer as columns."""
    found = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            found.append(inputs.T)
        inputs = layer(inputs)
    return found


def grown(basis, columns, threshold):
    """The basis with the fewest singular vectors of what it lacks of R that reach the threshold (eqs. 5, 8 and 9)."""
    left = columns if basis is None else columns - basis @ (basis.T @ columns)
    total = columns.square().sum()
    vectors, values, _ = torch.linalg.svd(left, full_matrices=False)
    held = total - left.square().sum()
    count = 0
    while held < threshold * total:
        held = held + values[count] ** 2
        count += 1
    return vectors[:, :count] if basis is None else torch.cat([basis, vectors[:, :count]], dim=1)


def test_batches_loaded_at_once_are_those_of_avalanche(parts):
    """Bit-identical weights after two tasks, from the same random state and to the same random state."""
    found = []
    for ours in (True, False):
        torch.manual_seed(3)
        trainer, _ = build(replace(config("Naive"), setting=SMALL), parts)
        if not ours:
            plugins = trainer.strategy.plugins
            plugins.remove(next(p for p in plugins if isinstance(p, WholeBatches)))
        for experience in list(parts.benchmark.train_stream)[:2]:
            trainer.train(experience)
        found.append([*(p.detach() for p in trainer.strategy.model.parameters()), torch.rand(1)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_all_tasks_at_once_are_the_tasks_one_after_another(parts):
    (whole,), size = stream(SMALL, 0, None, at_once=True).parts, len(parts.parts[0])
    assert len(whole) == 3 * size
    for task, part in enumerate(parts.parts):
        inputs, targets, labels = whole.__getitems__(
            range(task * size, (task + 1) * size)
        )
        torch.testing.assert_close((inputs, targets), part.all(), rtol=0, atol=0)
        assert torch.equal(inputs[7], whole[task * size + 7][0])
        assert not labels.any()
    assert not torch.equal(parts.parts[0].all()[0], parts.parts[1].all()[0])


@pytest.fixture(scope="module")
def measured(results_of):
    """Results of a few steps."""
    labels = ("Naive", "GPM", "GPM, momentum, gradient", "GPM, momentum, step", "multitask")
    configs = [config(label, tasks=3, examples=90, epochs=3) for label in labels]
    fast = [replace(c, setting=replace(c.setting, rate=20 * c.setting.rate)) for c in configs]  # learns in 27 steps
    return results_of(experiment, fast)


def values(results, metric, label):
    return [row["value"] for row in results.select(metric, label)]


def test_a_stale_momentum_buffer_leaks_through_projected_gradients_and_not_through_projected_steps(measured):
    assert max(values(measured, "leakage", "GPM, momentum, step")) < 1e-4
    assert min(values(measured, "leakage", "GPM, momentum, gradient")) > 1e-2
    assert len(values(measured, "leakage", "GPM")) == 2  # nothing is protected before the first task ends


def test_backward_transfer_is_final_less_learned_accuracy(measured):
    matrix = {(row["step"], row["task"]): row["value"] for row in measured.select("accuracy", "Naive")}
    changes = [matrix[3, task] - matrix[task + 1, task] for task in range(2)]
    assert sum(changes) < -0.1
    assert values(measured, "backward_transfer", "Naive") == [pytest.approx(sum(changes) / 2)]
    assert values(measured, "average_accuracy", "Naive") == [pytest.approx(sum(matrix[3, k] for k in range(3)) / 3)]
    assert not values(measured, "backward_transfer", "multitask")


def test_a_report_of_incomplete_results_is_written_with_what_the_paper_published_in_its_setting(measured, tmp_path):
    finished = measured.of(["GPM", "multitask"])
    written = report(replace(finished, labels=measured.labels), tmp_path)
    assert "| GPM " in written
    assert "93.91 ± 0.16" not in written
    paper = describe(Setting())
    headers = [{**h, "config": {**h["config"], "setting": paper}} for h in finished.headers]
    assert "93.91 ± 0.16" in report(replace(finished, headers=tuple(headers)), tmp_path)
    assert (tmp_path / "projections.png").exists()


def test_strengths_lie_within_the_grids_that_are_tried_on_seeds_that_are_not_reported():
    assert all(min(GRIDS[name]) < strength < max(GRIDS[name]) for name, strength in STRENGTHS.items())
    by_part = {part: experiment.configs(ProjectionsOptions(quick=True, part=part)) for part in PARTS}
    assert {c.first_seed for c in by_part[TUNE]} == {FIRST_SEED}
    assert {c.first_seed for part in PARTS if part != TUNE for c in by_part[part]} == {0}
    tried = {(type(c.method), c.method.strength) for c in by_part[TUNE]}
    assert {(type(c.method), c.method.strength) for c in by_part[MAIN] if c.label in STRENGTHS} <= tried


def test_without_mnist_the_remedy_is_named(tmp_path):
    with pytest.raises(UsageError, match="give --dataset-root DIR, with the four IDX files of MNIST"):
        setting_for(ProjectionsOptions())
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte is not there, or empty\. Put into"):
        setting_for(ProjectionsOptions(dataset_root=Path(tmp_path)))
    assert setting_for(ProjectionsOptions(quick=True)).images == "digits"


def test_the_setting_is_that_of_the_paper(monkeypatch):
    monkeypatch.setattr(projections, "check", lambda *_: None)
    setting = setting_for(ProjectionsOptions())
    assert (setting.tasks, setting.epochs, setting.batch, setting.rate) == (10, 5, 10, 0.01)
    assert [tuple(p.shape) for p in network(784, setting).parameters()] == [(100, 784), (100, 100), (10, 100)]
    assert setting.steps == 300_000
