"""The closed form of the leak against paper and against draws, what is watched in training, and the reports."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv import PermutedDigits
from avalanche_curv.core.projection.blocks import Layout, ProtectedBlock
from avalanche_curv.core.projection.protection import some_of
from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.quadratic.policies import part_of
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from benchmarks.experiments.leakage import experiment as leakage
from benchmarks.experiments.leakage import report as leakage_report
from benchmarks.experiments.leakage.experiment import expected
from benchmarks.experiments.rank_cut import experiment as rank_cut
from benchmarks.experiments.rank_cut import report as rank_cut_report
from benchmarks.experiments.soft_hard import experiment as soft_hard
from benchmarks.experiments.soft_hard import report as soft_hard_report
from benchmarks.harness import Options


def value(results, metric, label):
    return results.final(metric, label).mean


def explicit(cosine, tasks, rank, dimension):
    """E‖V₁ M g‖², E‖U M g‖² and E‖M g‖² of M = Π_t (I − V_tᵀ V_t), by the matrix itself."""
    drawn = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, (tasks + 1) * rank)))[0].T
    shared, *own = np.split(drawn, tasks + 1)
    frames = [math.sqrt(cosine) * shared + math.sqrt(1 - cosine) * rows for rows in own]
    product = np.eye(dimension)
    for rows in frames:
        product = (np.eye(dimension) - rows.T @ rows) @ product
    _, values, basis = np.linalg.svd(np.concatenate(frames), full_matrices=False)
    union = basis[values > 1e-9]
    return [float(np.square(rows @ product).sum()) for rows in (frames[0], union, np.eye(dimension))]


@pytest.mark.parametrize("cosine", [0.0, 0.2, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_the_closed_form_is_that_of_the_product_of_projections(cosine, tasks):
    first, union, total = explicit(cosine, tasks, rank=3, dimension=30)
    leak = expected(cosine, tasks, rank=3, dimension=30)
    assert leak.first == pytest.approx(math.sqrt(first / total), abs=1e-7)
    assert leak.union == pytest.approx(math.sqrt(union / total), abs=1e-7)


def test_for_two_tasks_the_leak_is_that_of_paper_and_largest_at_45_degrees():
    for c in (0.1, 0.5, 0.9):
        leak, total = expected(c, 2, rank=10, dimension=500), 10 * c**2 + 480
        assert leak.first == pytest.approx(math.sqrt(10 * c**2 * (1 - c**2) / total))
        assert leak.union == pytest.approx(math.sqrt(10 * c**2 / total))
    near = [expected(c, 2, rank=1, dimension=10**6).first for c in (0.69, math.sqrt(0.5), 0.72)]
    assert max(near) == near[1]


def test_any_two_subspaces_have_the_prescribed_angles():
    from scipy.linalg import subspace_angles

    frames = leakage.equiangular(4, 3, 40, 0.3, torch.Generator().manual_seed(0))
    for i, one in enumerate(frames):
        for other in frames[:i]:
            np.testing.assert_allclose(np.cos(subspace_angles(one.T.numpy(), other.T.numpy())), 0.3, rtol=1e-10)
    with pytest.raises(ValueError, match="built in 20 dimensions; there are 19"):
        leakage.equiangular(4, 4, 19, 0.3, torch.Generator())


def test_random_steps_leak_as_the_closed_form_says_and_not_from_one_basis():
    config = leakage.Subspaces("c", 0.6, tasks=(2, 5), dimension=60, rank=4, draws=4000)
    found = {(r["metric"], r["step"]): r["value"] for r in leakage.drawn(config, 0)}
    for tasks in config.tasks:
        for where in ("first", "union"):
            exact = found[f"expected/{where}", tasks]
            assert found[f"sequential/{where}", tasks] == pytest.approx(exact, rel=0.03)
            assert found[f"global/{where}", tasks] < 1e-6
        assert found["used", tasks] == 4 * tasks


@pytest.fixture(scope="module")
def trained(results_of):
    """Ten steps a task of some optimisers and projections, and one cosine."""

    def training(name, kind):
        parts = (leakage.OPTIMISERS[name], leakage.PROJECTIONS[kind])
        return leakage.Training(f"{name}, {kind}", name, *parts, steps=10, rank=5, examples=30)

    pairs = [("SGD", kind) for kind in leakage.PROJECTIONS]
    pairs += [(name, kind) for name in ("momentum, stale", "Adam") for kind in ("step", "gradient")]
    pairs += [("momentum, fresh", "gradient"), ("SGD, norm clipped", "gradient"), ("SGD, values clipped", "gradient")]
    configs = [leakage.Subspaces("cosine 0.5", 0.5, (2, 3), draws=50), *(training(*pair) for pair in pairs)]
    return results_of(leakage.experiment, configs)


def test_what_leaks_in_training_leaks_where_it_is_expected(trained):
    """Momentum leaks for the buffer that Avalanche carries from one experience to the next; cleared, it does not."""
    kept = ("SGD, step", "momentum, stale, step", "Adam, step", "SGD, gradient", "momentum, fresh, gradient")
    for label in (*kept, "SGD, norm clipped, gradient"):
        assert value(trained, "drift", label) < 1e-6
    for label in ("momentum, stale, gradient", "Adam, gradient", "SGD, values clipped, gradient", "SGD, sequential"):
        assert value(trained, "drift", label) > 1e-3


def test_the_drift_of_a_known_walk_is_measured_as_on_paper():

    model = nn.Linear(2, 1, bias=False)
    line = Subspace(torch.tensor([[0.6, 0.8]]))
    space = SimpleNamespace(blocks={"": ProtectedBlock(Layout(ParameterSpace.of(model)), line)})
    strategy = SimpleNamespace(model=model, clock=SimpleNamespace(train_exp_iterations=0))
    watcher = leakage.Watcher(SimpleNamespace(protected=space))
    nn.init.zeros_(model.weight)
    watcher.before_training_exp(strategy)
    for iteration, step in ((0, [1.0, 0.0]), (1, [0.0, 1.0])):
        strategy.clock.train_exp_iterations = iteration
        watcher.before_update(strategy)
        model.weight.data += torch.tensor([step])
        watcher.after_update(strategy)
    assert watcher.drift == {1: pytest.approx(0.6)}
    assert watcher.of_steps == pytest.approx(math.sqrt((0.36 + 0.64) / 2))


def test_the_leakage_report_is_written_of_what_there_is(trained, tmp_path):
    written = leakage_report.report(trained, tmp_path)
    assert "| 0.5    |" in written
    assert "| momentum, stale " in written
    assert {path.name for path in tmp_path.iterdir()} == {"leakage_angles.png", "leakage_optimisers.png"}
    assert "## Random steps" not in leakage_report.report(trained.where(part=leakage.TRAINED), tmp_path)


@pytest.fixture(scope="module")
def cuts(results_of):
    """Two ranks, three short tasks."""
    configs = [rank_cut.Config(f"rank {rank}", rank, experiences=3, steps=8) for rank in (10, 1000)]
    return results_of(rank_cut.experiment, configs)


def test_a_cut_beyond_all_parameters_freezes_them_exactly_though_batches_fluctuate(cuts):
    assert value(cuts, "largest_distance", "rank 1000") == 0
    assert value(cuts, "largest_distance", "rank 10") > 1e-2
    assert [value(cuts, f"free/{number}", "rank 1000") for number in range(3)] == [502, 0, 0]
    assert [value(cuts, f"free/{number}", "rank 10") for number in range(3)] == [502, 492, 482]
    batches = [row["value"] for row in cuts.select("batch_accuracy", "rank 1000") if 8 <= row["step"] < 16]
    assert len(set(batches)) > 1


def test_batches_of_a_model_that_stands_still_fluctuate_as_drawing_without_replacement_does():

    rng = np.random.default_rng(0)
    right = np.arange(200) < 140
    batches = []
    for _ in range(400):
        order = rng.permutation(right)
        batches += [(order[i : i + 32].mean(), len(order[i : i + 32])) for i in range(0, 200, 32)]
    found, exact = rank_cut.fluctuation(batches, 200)
    assert found == pytest.approx(exact, rel=0.05)


def test_the_report_of_the_cuts_says_that_nothing_moved(cuts, tmp_path):
    written = rank_cut_report.report(cuts, tmp_path)
    row = next(line for line in written.splitlines() if line.startswith("| rank 1000"))
    assert "0 exactly" in row
    assert (tmp_path / "rank_cut.png").exists()


def test_soft_and_hard_see_the_same_examples():

    (hard,), (soft,) = (
        soft_hard.plugins(next(c for c in soft_hard.experiment.configs(Options()) if c.method == method), 1438)
        for method in (soft_hard.HARD, soft_hard.FLAT)
    )
    items = [(x, int(y)) for x, y, *_ in PermutedDigits(1, seed=0).train_stream[0].dataset.eval()]
    batches = [(torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items]))]
    risk = EmpiricalRisk.snapshot(nn.Linear(64, 10), nn.CrossEntropyLoss(), batches)
    assert risk.examples == 1438
    ((x, _),) = some_of(risk, hard.protect.examples, hard.protect.seed, 3).batches
    ((other, _),) = part_of(risk, soft.policy.fraction, soft.policy.seed, 3).batches
    assert len(x) == 144
    assert torch.equal(x, other)


def test_soft_and_hard_are_run_and_reported(results_of, tmp_path):
    setting = replace(soft_hard.SETTINGS[1], experiences=2, steps=4, examples=20)
    configs = soft_hard.rows(setting, (3,), (1.0,))
    assert [c.method for c in configs] == [soft_hard.NAIVE, soft_hard.HARD, soft_hard.FLAT, soft_hard.TRUE]
    found = results_of(soft_hard.experiment, configs)
    written = soft_hard_report.report(found, tmp_path)
    assert "| k = 3, soft, flat, λ = 1 |" in written
    assert (tmp_path / "soft_hard.png").exists()
    for config in configs:
        assert 0 <= value(found, "past", config.label) <= 1
