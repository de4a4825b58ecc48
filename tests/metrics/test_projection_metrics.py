import copy
import math

import numpy as np
import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training.plugins import SupervisedPlugin
from scipy.linalg import block_diag, orth, subspace_angles
from torch import nn

from avalanche_curv import (
    Dense,
    Eigenspace,
    EmpiricalRisk,
    Fisher,
    GradientProjection,
    Hessian,
    InputSpace,
    LeaveUncovered,
    OrthogonalProjection,
    OrthogonalProjectionPlugin,
    PerLayer,
    Protection,
    Rank,
    SequentialProjection,
    StepProjection,
    WholeModel,
    estimate,
    projection_metrics,
)
from avalanche_curv.core.curvature.base import NonFiniteCurvatureError
from avalanche_curv.core.projection.protection import TaskFindings
from avalanche_curv.tensorboard import CHARTS

SIZES = ("used", "free", "energy", "bytes")
ANGLES = ("smallest_angle", "largest_angle", "overlap")
RANK = 3
PARTS = [(WholeModel(), [slice(0, 27)]), (PerLayer(), [slice(0, 15), slice(15, 27)])]  # of the net 2-5-2


def published(strategy):
    return strategy.evaluator.get_all_metrics()


def vector(model):
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


def leakage(basis, change):
    """‖Uᵀ Δ‖ / ‖Δ‖ for orthonormal columns."""
    return np.linalg.norm(basis.T @ change) / np.linalg.norm(change)


def closeness(angles):
    return {
        "smallest_angle": np.rad2deg(angles.min()),
        "largest_angle": np.rad2deg(angles.max()),
        "overlap": np.mean(np.cos(angles) ** 2),
    }


class Starts(SupervisedPlugin):
    """Copies of the model as each experience begins."""

    def __init__(self):
        super().__init__()
        self.models = []

    def before_training_exp(self, strategy, **kwargs):
        self.models.append(copy.deepcopy(strategy.model))


class Paper:
    """Top eigenvectors of the Fisher matrices at the end of each task, written out, and the union of them by SVD."""

    def __init__(self, ends, tasks, parts):
        self.parts, self.matrices = parts, [self.fisher(*both) for both in zip(ends, tasks)]
        found = [[np.linalg.eigh(matrix[part, part]) for part in parts] for matrix in self.matrices]
        self.values = [[values[-RANK:] for values, _ in task] for task in found]
        self.vectors = [[vectors[:, -RANK:] for _, vectors in task] for task in found]

    def fisher(self, model, task):
        risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [task])
        return estimate(Fisher(), Dense(), risk).curvature.dense().numpy()

    def basis(self, count):
        """Of the first tasks, in columns."""
        return block_diag(*self._unions(count))

    def used(self, count):
        return sum(union.shape[1] for union in self._unions(count))

    def energy(self, count):
        held = sum(values.sum() for task in self.values[:count] for values in task)
        return held / sum(np.trace(matrix) for matrix in self.matrices[:count])

    def angles(self, first, second):
        return np.concatenate([subspace_angles(*both) for both in zip(self.vectors[first], self.vectors[second])])

    def nbytes(self, count):
        """Float64: a basis [k, d] of each block, and for each task [3, k] coordinates and 3 values."""
        return sum(8 * (union.size + count * (RANK * union.shape[1] + RANK)) for union in self._unions(count))

    def _unions(self, count):
        return [orth(np.hstack(every), rcond=1e-7) for every in zip(*self.vectors[:count])]


@pytest.fixture
def net64(net, double):
    net.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return net.double()


@pytest.fixture
def paper(examples, plane):
    """paper(models at the ends of all tasks, parts) -> Paper."""
    return lambda ends, parts: Paper(ends, [(x.double(), y) for x, y in map(examples, plane.train_stream)], parts)


# --- values on paper ---


@pytest.mark.parametrize("projection", [StepProjection(), GradientProjection(), SequentialProjection()])
@pytest.mark.parametrize(("per", "parts"), PARTS)
def test_values_are_those_of_the_matrices_written_out(
    per, parts, projection, net64, learner, train, plane, recorder, paper
):
    protect = Eigenspace(cut=Rank(RANK), per=per, examples=None)
    starts, plugin = Starts(), OrthogonalProjectionPlugin(protect, projection=projection)
    strategy = train(
        learner(net64, starts, plugin, recorder, metrics=projection_metrics(every=2), train_epochs=2),
        plane.train_stream,
    )
    paper = paper(recorder.ends, parts)
    names = published(strategy)
    at = [6, 8, 10, 12, 14, 16]  # six iterations an experience, every other of the second and third
    expected = {"step_leakage": [], "drift_leakage": []}
    for step in at:
        count, now = step // 6, vector(recorder.steps[step])
        before = vector(recorder.steps[step - 1])
        expected["step_leakage"].append(leakage(paper.basis(count), now - before))
        expected["drift_leakage"].append(leakage(paper.basis(count), now - vector(starts.models[count])))
    for name, values in expected.items():
        assert names[f"projection/{name}"][0] == at
        assert names[f"projection/{name}"][1] == pytest.approx(values, rel=1e-5, abs=1e-10)
    leaks = type(projection).__name__ in ("GradientProjection", "SequentialProjection")
    assert (max(expected["step_leakage"]) > 1e-3) == (max(expected["drift_leakage"]) > 1e-3) == leaks

    for group, counts in (("projection", [step // 6 for step in at]), ("projection_experience", [1, 2, 3])):
        used = [paper.used(count) for count in counts]
        assert names[f"{group}/used"][1] == used
        assert names[f"{group}/free"][1] == [27 - n for n in used]
        assert names[f"{group}/energy"][1] == pytest.approx([paper.energy(count) for count in counts])
        assert names[f"{group}/bytes"][1] == [paper.nbytes(count) for count in counts]
    assert names["projection_experience/used"][0] == [6, 12, 18]
    assert names["projection/used"][0] == at


@pytest.mark.parametrize(("per", "parts"), PARTS)
def test_angles_are_those_between_the_eigenspaces_of_each_two_tasks(
    per, parts, net64, learner, train, plane, recorder, paper
):
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(RANK), per=per, examples=None))
    strategy = train(learner(net64, plugin, recorder, metrics=projection_metrics(every=1)), plane.train_stream)
    paper = paper(recorder.ends, parts)
    names = published(strategy)
    for short in ANGLES:
        name = f"projection_experience/{short}"
        first, second, third = (closeness(paper.angles(*pair))[short] for pair in ((0, 1), (0, 2), (1, 2)))
        both = closeness(np.concatenate([paper.angles(0, 2), paper.angles(1, 2)]))[short]
        assert names[f"{name}/experience_0"][1] == pytest.approx([first, second], rel=1e-6)
        assert names[f"{name}/experience_1"][1] == pytest.approx([third], rel=1e-6)
        assert names[name][1] == pytest.approx([first, both], rel=1e-6)
        assert f"{name}/experience_2" not in names
        assert names[f"{name}/experience_0"][0] == [6, 9]


def test_the_same_task_again_has_overlap_one_and_uses_nothing(make, learner, train, stream_of, examples, digits):
    """A model at rest has the same curvature again."""
    images, labels = examples(digits().train_stream[0])
    model = make(lambda: nn.Linear(64, 10))
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(4)))
    stream = stream_of([(images, labels)] * 2).train_stream
    names = published(train(learner(model, plugin, metrics=projection_metrics(every=1), optimizer=still), stream))
    assert names["projection_experience/overlap"][1] == pytest.approx([1])
    assert names["projection_experience/largest_angle"][1] == pytest.approx([0], abs=1e-3)
    assert names["projection_experience/used"][1] == [4, 4]


def test_input_spaces_count_each_output_and_leak_by_rows(make, double, learner, train, regression, recorder, examples):
    """Of one linear layer: rows (w, b) against the two largest principal axes of (a, 1), for each of two outputs."""
    model = make(lambda: nn.Linear(3, 2)).double()
    starts = Starts()
    plugin = OrthogonalProjectionPlugin(InputSpace(Rank(2)), projection=GradientProjection())
    heavy = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    strategy = train(
        learner(model, starts, plugin, recorder, metrics=projection_metrics(every=1), optimizer=heavy,
                criterion=nn.MSELoss(), train_mb_size=10),
        regression.train_stream[:2],
    )
    names = published(strategy)

    def axes(experience):
        inputs = torch.stack([x for x, *_ in experience.dataset.eval()]).numpy()
        whole = np.hstack([inputs, np.ones((len(inputs), 1))])
        return np.linalg.eigh(whole.T @ whole)[1][:, -2:]

    def rows(one):
        return np.hstack([one.weight.detach().numpy(), one.bias.detach().numpy()[:, None]])

    first, second = (axes(experience) for experience in regression.train_stream[:2])
    change = rows(recorder.steps[-1]) - rows(starts.models[1])
    expected = np.linalg.norm(change @ first) / np.linalg.norm(change)
    assert names["projection/drift_leakage"][1][-1] == pytest.approx(expected)
    assert expected > 1e-2
    assert names["projection_experience/used"][1][0] == 2 * 2
    assert names["projection_experience/free"][1][0] == 8 - 4
    overlap = np.mean(np.cos(subspace_angles(first, second)) ** 2)
    assert names["projection_experience/overlap"][1] == pytest.approx([overlap])


# --- what is published when ---


def test_all_charts_are_filled_with_floats(net, learner, train, plane):
    plugin = OrthogonalProjectionPlugin()
    names = published(train(learner(net, plugin, metrics=projection_metrics(every=1)), plane.train_stream))
    assert set(CHARTS["Projection"].values()) <= set(names)
    assert {name.split("/")[1] for name in names} == {"step_leakage", "drift_leakage", *SIZES, *ANGLES}
    assert all(type(value) is float and math.isfinite(value) for _, values in names.values() for value in values)


def test_with_nothing_protected_only_the_end_of_an_experience_is_measured(net, learner, train, plane):
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(RANK)))
    strategy = train(learner(net, plugin, metrics=projection_metrics(every=1)), plane.train_stream[:1])
    assert set(published(strategy)) == {f"projection_experience/{name}" for name in SIZES}


class Some(Protection):
    """The eigenspaces of some tasks alone."""

    def __init__(self, *tasks):
        self.tasks, self.own = tasks, Eigenspace(cut=Rank(RANK))

    def find(self, risk, experience):
        return self.own.find(risk, experience) if experience in self.tasks else TaskFindings([])

    def bounds(self, space):
        return self.own.bounds(space)


def test_a_task_that_needs_nothing_has_no_angles(net, learner, train, plane):
    plugin = OrthogonalProjectionPlugin(Some(0, 1))
    names = published(train(learner(net, plugin, metrics=projection_metrics(every=1)), plane.train_stream))
    assert names["projection_experience/used"][1] == [3, 6, 6]
    assert names["projection_experience/overlap"][0] == names["projection_experience/overlap/experience_0"][0] == [6]
    assert "projection_experience/overlap/experience_1" not in names


@pytest.mark.parametrize(
    ("protect", "lr", "steps", "ends"),
    [
        (Some(), 0.1, (), ("used", "free", "bytes")),  # no task needs anything, so no energy is kept either
        (Eigenspace(cut=Rank(RANK)), 0.0, SIZES, (*SIZES, *ANGLES)),  # a step that moves nothing has no leakage
        (Eigenspace(Hessian(), Rank(RANK)), 0.1, ("step_leakage", "drift_leakage", "used", "free", "bytes"),
         ("used", "free", "bytes", *ANGLES)),  # the trace of an indefinite matrix tells nothing
    ],
)  # fmt: skip
def test_what_is_not_defined_is_left_out(protect, lr, steps, ends, net, learner, train, plane):
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    plugin = OrthogonalProjectionPlugin(protect)
    metrics = projection_metrics(every=1)
    names = published(train(learner(net, plugin, metrics=metrics, optimizer=sgd), plane.train_stream))
    wanted = {f"projection/{name}" for name in steps} | {f"projection_experience/{name}" for name in ends}
    assert {name for name in names if name.count("/") == 1} == wanted
    if not steps:
        assert names["projection_experience/used"][1] == [0, 0, 0]
        assert names["projection_experience/free"][1] == [27, 27, 27]


def test_a_strategy_without_a_projection_publishes_none(net, learner, train, plane):
    assert published(train(learner(net, metrics=projection_metrics(every=1)), plane.train_stream)) == {}


def test_the_ready_strategy_is_measured(net, learner, train, plane):
    strategy = train(learner(net, kind=OrthogonalProjection, metrics=projection_metrics(every=3)), plane.train_stream)
    assert published(strategy)["projection/step_leakage"][0] == [3, 6]


def test_several_plugins_are_numbered(net, learner, train, plane):
    two, five = (Eigenspace(cut=Rank(n)) for n in (2, 5))
    plugins = OrthogonalProjectionPlugin(two), OrthogonalProjectionPlugin(five, projection=GradientProjection())
    strategy = train(learner(net, *plugins, metrics=projection_metrics(every=1)), plane.train_stream[:2])
    last = strategy.evaluator.get_last_metrics()
    assert (last["projection/used"], last["projection_1/used"]) == (2, 5)
    assert (last["projection_experience/used"], last["projection_1_experience/used"]) == (4, 10)
    assert last["projection/drift_leakage"] < 1e-6 < 1e-3 < last["projection_1/drift_leakage"]
    assert "projection_1_experience/overlap/experience_0" in last


# --- models and streams ---


def test_of_a_model_that_grows_the_past_part_leaks_and_what_is_new_is_free(growing, double, learner, train, recorder):
    model, benchmark = growing(torch.float64)
    starts, spaces = Starts(), []
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(RANK)), projection=GradientProjection())

    class Spaces(SupervisedPlugin):
        def before_training_exp(self, strategy, **kwargs):
            spaces.append(plugin.protected)

    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    strategy = train(
        learner(model, starts, Spaces(), plugin, recorder, metrics=projection_metrics(every=1), optimizer=adam),
        benchmark.train_stream,
    )
    names = published(strategy)
    (block,) = spaces[-1].blocks.values()
    past, shapes = block.layout.space.names, block.layout.space.shapes

    def cut(one):
        named = dict(one.named_parameters())
        return np.concatenate([
            named[name].detach().numpy()[tuple(slice(n) for n in shape)].ravel() for name, shape in zip(past, shapes)
        ])

    now = recorder.steps[-1]
    basis = block.subspace.rows.numpy().T
    for name, start in (("step", recorder.steps[-2]), ("drift", starts.models[-1])):
        expected = leakage(basis, cut(now) - cut(start))
        assert names[f"projection/{name}_leakage"][1][-1] == pytest.approx(expected)
        assert expected > 1e-2
    sizes = [sum(p.numel() for p in one.parameters()) for one in recorder.ends]
    totals = [sum(both) for both in zip(*(names[f"projection_experience/{name}"][1] for name in ("used", "free")))]
    assert totals == sizes
    assert sizes[0] < sizes[-1]


def test_used_and_free_are_of_what_may_move(make, learner, train, plane):
    """With the first layer and the norm frozen, U's columns of the last layer bound what it may do; the norm layer, of
    which no inputs are known, is held."""
    model = make(lambda: nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)))
    plugins = (
        OrthogonalProjectionPlugin(Eigenspace(cut=Rank(4))),
        OrthogonalProjectionPlugin(InputSpace(Rank(2))),
        OrthogonalProjectionPlugin(InputSpace(Rank(2)), uncovered=LeaveUncovered()),
    )
    strategy = train(learner(model, *plugins, metrics=projection_metrics(every=1)), plane.train_stream[:1])
    last = strategy.evaluator.get_last_metrics()
    groups = ("projection", "projection_1", "projection_2")
    assert [last[f"{group}_experience/used"] for group in groups] == [4, 5 * 2 + 2 * 2 + 10, 5 * 2 + 2 * 2]
    assert [last[f"{group}_experience/free"] for group in groups] == [33, 37 - 24, 37 - 14]
    rows = next(iter(plugins[0].protected.blocks.values())).subspace.rows.numpy()
    (model[0].requires_grad_(False), model[1].requires_grad_(False))
    train(strategy, plane.train_stream[1:2])
    names = published(strategy)
    rank = np.linalg.matrix_rank(rows[:, -12:], tol=1e-5)
    assert [names[f"{group}/used"][1][0] for group in groups] == [rank, 2 * 2, 2 * 2]
    assert [names[f"{group}/free"][1][0] for group in groups] == [12 - rank, 8, 8]
    assert names["projection_2/step_leakage"][1][-1] < 1e-5


def test_in_an_online_stream_the_drift_is_from_the_start_of_the_task(net64, learner, train, plane, recorder):
    parts = list(split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0))
    starts, plugin = Starts(), OrthogonalProjectionPlugin(Eigenspace(cut=Rank(RANK)), projection=GradientProjection())
    strategy = learner(net64, starts, plugin, recorder, metrics=projection_metrics(every=1), train_mb_size=8)
    train(strategy, parts[:3])  # three parts a task, of two iterations
    basis = next(iter(plugin.protected.blocks.values())).subspace.rows.numpy().T
    train(strategy, parts[3:6])
    names = published(strategy)
    assert names["projection/drift_leakage"][0] == [6, 7, 8, 9, 10, 11]
    assert names["projection_experience/used"][0] == [6, 12]
    expected = [leakage(basis, vector(now) - vector(starts.models[3])) for now in recorder.steps[6:]]
    assert names["projection/drift_leakage"][1] == pytest.approx(expected)
    assert min(expected[1:]) > 1e-3
    train(strategy, parts[6:])
    assert published(strategy)["projection_experience/used"][0] == [6, 12, 18]


def test_a_diverging_run_publishes_what_is_defined_and_the_next_drift_starts_anew(net, learner, train, plane):
    whole = copy.deepcopy(net.state_dict())
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(RANK)), projection=GradientProjection())
    strategy = train(learner(net, plugin, metrics=projection_metrics(every=1)), plane.train_stream[:1])
    strategy.optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(NonFiniteCurvatureError):
        train(strategy, plane.train_stream[1:2])
    assert {name for name in published(strategy) if name.startswith("projection/")} == {
        f"projection/{name}" for name in SIZES
    }
    net.load_state_dict(whole)
    strategy.optimizer.state.clear()
    strategy.optimizer.param_groups[0]["lr"] = 0.1
    names = published(train(strategy, plane.train_stream[1:2]))
    assert names["projection/drift_leakage"][1][0] == names["projection/step_leakage"][1][0]


# --- no trace ---


@pytest.mark.parametrize("projection", [StepProjection(), GradientProjection(), SequentialProjection()])
def test_measuring_leaves_training_bit_identical(projection, assert_leaves_no_trace):
    plugins = []

    def fresh():
        plugins.append(OrthogonalProjectionPlugin(Eigenspace(), projection=projection))
        return plugins[-1:]

    assert_leaves_no_trace(projection_metrics(every=2), fresh)
    bases = [next(iter(plugin.protected.blocks.values())).subspace.rows for plugin in plugins]
    assert torch.equal(*bases)


@pytest.mark.parametrize(("online", "saved"), [(False, 2), (True, 4)])
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(online, saved, plane, assert_resumes):
    """Saved after a task, and in the midst of one that comes in three parts."""
    stream = list(plane.train_stream)
    if online:
        stream = list(split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0))
    plugin = OrthogonalProjectionPlugin(Eigenspace(cut=Rank(RANK)), projection=GradientProjection())
    metrics, starts = projection_metrics(every=2), []
    assert_resumes(metrics, plugin, stream=stream, saved=saved, train_mb_size=8,
                   meanwhile=lambda: starts.append(bool(metrics[0]._starts)))  # fmt: skip
    assert starts == [online]  # it holds a copy of the model where the drift goes on alone
