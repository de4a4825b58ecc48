import copy
import math
import pickle

import pytest
import torch
from avalanche.benchmarks.scenarios import split_online_stream
from avalanche.logging import TensorboardLogger
from avalanche.models import MTSimpleMLP, avalanche_forward
from avalanche.training import Replay
from avalanche.training.plugins import SupervisedPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy, pad

from avalanche_curv import (
    GGN,
    BatchedEmpiricalFisher,
    Clip,
    CurvatureEWC,
    CurvatureEWCPlugin,
    Dense,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Merge,
    Refresh,
    estimate,
    fidelity_metrics,
)
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part

MODELS = ("accumulate", "accumulate_linear", "refresh", "refresh_linear")
MEASURES = ("kappa", "kappa_abs", "gamma", "alpha", "rho", "rho_pooled")


def published(strategy):
    return strategy.evaluator.get_all_metrics()


class PastFunction:
    """The model as it was at the end of an experience, one example at a time."""

    def __init__(self, model, task):
        self.model, self.task = model, task
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def parameters(self, model):
        """Those of a model that may have grown since."""
        later = dict(model.named_parameters())
        return {n: later[n].detach()[tuple(slice(k) for k in shape)] for n, shape in self.shapes.items()}

    def loss(self, parameters, x, y):
        inputs = (x[None], torch.tensor([self.task])) if self.task is not None else (x[None],)
        return cross_entropy(functional_call(self.model, parameters, inputs), y[None])

    def loss_and_gradient(self, model, x, y):
        parameters = {n: p.requires_grad_() for n, p in self.parameters(model).items()}
        loss = self.loss(parameters, x, y)
        parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return loss.detach(), torch.cat([part.reshape(-1) for part in parts])

    def vector(self, model):
        return torch.cat([p.reshape(-1) for p in self.parameters(model).values()])

    def forward(self, model, inputs):
        """A multi-head model for one task; its outputs are padded with zeros, as those for a tensor of labels are."""
        outputs = model(inputs, self.task)
        return pad(outputs, (0, model.classifier.max_class_label - outputs.shape[1]))


def on_paper(past, anchored, now, curvature, stored):
    """The measures without and with the linear term, example by example, from each one's own dense curvature.

    `past` is the past function, `anchored` the model whose parameters are the anchor, `now` the current model.
    """
    rows = {"": [], "_linear": []}
    delta = past.vector(now) - past.vector(anchored)
    for x, y in zip(*stored):
        risk = EmpiricalRisk.snapshot(
            past.model, nn.CrossEntropyLoss(), [(x[None], y[None])], forward=None if past.task is None else past.forward
        )
        bend = estimate(curvature, Dense(), risk).curvature.dense() @ delta
        before, slope = past.loss_and_gradient(anchored, x, y)
        after, gradient = past.loss_and_gradient(now, x, y)
        for name, predicted, increase in (
            ("", bend, 0.5 * bend @ delta),
            ("_linear", bend + slope, 0.5 * bend @ delta + slope @ delta),
        ):
            actual = after - before
            rows[name].append([
                actual - increase,
                (actual - increase).abs(),
                (gradient - predicted).norm(),
                cosine_similarity(gradient, predicted, dim=0),
                actual / increase,
                actual,
                increase,
            ])
    values = {}
    for name, row in rows.items():
        mean = torch.tensor(row).mean(0)
        values[name] = dict(zip(MEASURES, [*mean[:5].tolist(), float(mean[5] / mean[6])]))
    return values


@pytest.mark.parametrize("curvature", [GGN(), EmpiricalFisher()])
def test_values_equal_those_of_every_stored_example_on_paper(
    curvature, double, growing, learner, train, examples, recorder
):
    fraction, seed = 0.1, 7
    model, benchmark = growing(torch.float64)
    metrics = fidelity_metrics(curvature=curvature, fraction=fraction, seed=seed, every=1)
    strategy = train(learner(model, recorder, metrics=metrics, train_mb_size=25), benchmark.train_stream)
    names = published(strategy)
    # at the last iteration: the first experience at its own anchor, and at the end of the second one
    now, ends = recorder.steps[-1].eval(), recorder.ends
    task = None if isinstance(model, nn.Sequential) else 0
    inputs, targets = examples(benchmark.train_stream[0])
    kept = random_part(50, fraction, part_seed(seed, 0))
    stored = inputs[kept], targets[kept]
    assert len(kept) == 5
    own, newer = PastFunction(ends[0], task), PastFunction(ends[1], task)
    for name, values in {
        "accumulate": on_paper(own, ends[0], now, curvature, stored),
        "refresh": on_paper(newer, ends[1], now, curvature, stored),
    }.items():
        for suffix, expected in values.items():
            got = {m: names[f"fidelity/{name}{suffix}/{m}/experience_0"][1][-1] for m in MEASURES}
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-9), name + suffix


def test_the_overall_value_is_the_mean_over_all_stored_examples(net, learner, train, plane):
    strategy = train(learner(net, metrics=fidelity_metrics(every=1, fraction=0.25)), plane.train_stream)
    last = strategy.evaluator.get_last_metrics()
    for form in MODELS:  # every experience stores 12 examples
        for measure in ("kappa", "kappa_abs", "gamma"):
            parts = [last[f"fidelity/{form}/{measure}/experience_{t}"] for t in (0, 1)]
            assert last[f"fidelity/{form}/{measure}"] == pytest.approx(sum(parts) / 2, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("curvature", [GGN(), Fisher(), Hessian()])
def test_squared_error_of_a_linear_model_is_its_own_quadratic(curvature, double, learner, train, regression):
    linear = nn.Linear(3, 2)
    strategy = train(
        learner(linear, criterion=nn.MSELoss(), metrics=fidelity_metrics(curvature=curvature, every=1, fraction=0.5)),
        regression.train_stream,
    )
    last = strategy.evaluator.get_last_metrics()
    for group in ("fidelity", "fidelity_experience", "fidelity_trajectory"):
        for form in ("accumulate_linear", "refresh_linear"):
            for past in ("", "/experience_0", "/experience_1"):
                got = [last[f"{group}/{form}/{measure}{past}"] for measure in ("kappa_abs", "gamma", "alpha")]
                assert got == pytest.approx([0, 0, 1], abs=1e-12)
                assert last[f"{group}/{form}/rho_pooled{past}"] == pytest.approx(1, abs=1e-9)
    assert last["fidelity/accumulate/kappa_abs"] > 0.01  # without the linear term: no anchor is a minimum
    assert not [name for name in last if name.startswith("accuracy")]


def test_a_past_function_that_does_not_move_has_no_error_though_the_model_grows(growing, learner, train):
    model, benchmark = growing()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    strategy = learner(model, metrics=fidelity_metrics(every=1, fraction=1.0), optimizer=still)
    train(strategy, benchmark.train_stream)
    last = strategy.evaluator.get_last_metrics()
    for form in MODELS:
        for past in ("", "/experience_0", "/experience_1"):
            assert last[f"fidelity/{form}/kappa{past}"] == 0
            assert last[f"fidelity/{form}/kappa_abs{past}"] == 0
    assert last["fidelity/accumulate_linear/gamma"] == pytest.approx(0, abs=1e-6)
    assert last["fidelity/accumulate/gamma"] > 0.1
    assert "fidelity/accumulate/alpha" not in last  # undefined: the quadratic model is flat at its anchor


def test_growth_is_the_jump_of_the_past_loss_before_the_first_step(growing, double, learner, train, examples, recorder):
    model, benchmark = growing(torch.float64)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    strategy = learner(model, recorder, metrics=fidelity_metrics(every=1, fraction=1.0), optimizer=still)
    names = train(strategy, benchmark.train_stream).evaluator.get_all_metrics()
    starts, ends = recorder.steps[0::3], recorder.ends  # a still model differs by what it grows at each start
    assert len(starts) == 3
    for past in (0, 1):
        inputs, targets = examples(benchmark.train_stream[past])
        task = torch.full((50,), past if isinstance(model, MTSimpleMLP) else 0)
        own, before, now = (
            cross_entropy(avalanche_forward(m.eval(), inputs, task), targets).item()
            for m in (ends[past], ends[1], starts[2])
        )
        assert names[f"growth/accumulate/experience_{past}"][1][-1] == pytest.approx(now - own, abs=1e-9)
        assert names[f"growth/refresh/experience_{past}"][1][-1] == pytest.approx(now - before, abs=1e-9)
    assert names["growth/refresh"][0] == [3, 6]
    if isinstance(model, nn.Sequential):  # unmasked units
        assert min(names["growth/refresh"][1]) > 0.1


def test_a_model_that_does_not_grow_forgets_without_growth(net, learner, train, plane):
    strategy = train(learner(net, metrics=fidelity_metrics(every=1), train_epochs=5), plane.train_stream)
    names = strategy.evaluator.get_all_metrics()
    assert max(map(abs, names["fidelity/accumulate/kappa/experience_0"][1])) > 1e-3
    for name in ("growth/accumulate", "growth/accumulate/experience_0", "growth/refresh"):
        assert names[name][1] == pytest.approx([0.0, 0.0], abs=1e-7)


def test_growth_is_measured_once_a_task_of_an_online_stream(net, learner, train, plane):
    stream = split_online_stream(plane.train_stream, experience_size=10, access_task_boundaries=True)
    strategy = train(learner(net, metrics=fidelity_metrics(), train_mb_size=5), stream)
    assert strategy.evaluator.get_all_metrics()["growth/refresh"][1] == [0.0, 0.0]


def expected_names(experiences):
    for form in MODELS:
        for measure in MEASURES:
            yield f"{form}/{measure}"
            yield from (f"{form}/{measure}/experience_{t}" for t in range(experiences))
    yield from ("accumulate/distance", "refresh/distance")
    yield from (f"accumulate/distance/experience_{t}" for t in range(experiences))


@pytest.mark.parametrize("kind", [Replay, CurvatureEWC])
def test_every_strategy_and_head_publishes_the_same_names_and_python_floats(kind, growing, learner, train):
    model, benchmark = growing()
    options = {Replay: {"mem_size": 20}, CurvatureEWC: {"strength": 1.0}}.get(kind, {})
    metrics = fidelity_metrics(every=2, fraction=0.2, stream=benchmark.test_stream)
    strategy = train(learner(model, kind=kind, metrics=metrics, **options), benchmark.train_stream)
    names = published(strategy)
    groups = ("fidelity", "fidelity_experience", "fidelity_trajectory")
    wanted = {f"{group}/{name}" for group in groups for name in expected_names(2)}
    pasts = ("", "/experience_0", "/experience_1")
    wanted |= {f"growth/{form}{past}" for form in ("accumulate", "refresh") for past in pasts}
    parts = ("current_task", "past_tasks", "stored")
    wanted |= {f"{group}/{part}" for group in ("accuracy", "accuracy_experience") for part in parts}
    if kind is CurvatureEWC:
        wanted |= {"penalty/raw", "penalty/weighted"}
    assert set(names) == wanted
    for _, values in names.values():
        assert all(type(value) is float and math.isfinite(value) for value in values)


def test_every_n_counts_from_the_first_iteration_of_each_experience(net, learner, train, plane):
    strategy = train(learner(net, metrics=fidelity_metrics(every=4), train_epochs=2), plane.train_stream)
    names = published(strategy)  # 6 iterations an experience
    assert names["fidelity/accumulate/kappa"][0] == [6, 10, 12, 16]
    assert names["fidelity/refresh/rho/experience_1"][0] == [12, 16]
    assert names["accuracy/current_task"][0] == [0, 4, 6, 10, 12, 16]
    assert names["accuracy/past_tasks"][0] == names["accuracy/stored"][0] == [6, 10, 12, 16]
    for group in ("fidelity_experience", "fidelity_trajectory"):
        assert names[f"{group}/accumulate/kappa"][0] == [12, 18]
    assert names["accuracy_experience/current_task"][0] == [6, 12, 18]


def test_the_trajectory_is_the_mean_of_the_values_published_so_far(net, learner, train, plane):
    strategy = train(learner(net, metrics=fidelity_metrics(every=2), train_epochs=2), plane.train_stream)
    names = published(strategy)
    averages = {n.split("/", 1)[1]: values for n, (_, values) in names.items() if n.startswith("fidelity_trajectory/")}
    assert averages.keys() == set(expected_names(2))
    for name, values in averages.items():
        steps, measured = names[f"fidelity/{name}"]
        for end, average in zip((12, 18)[-len(values) :], values):
            so_far = [value for step, value in zip(steps, measured) if step < end]
            assert average == pytest.approx(sum(so_far) / len(so_far), rel=1e-12)


def test_the_end_of_an_experience_is_measured_before_it_becomes_past(net, learner, train, plane):
    strategy = train(learner(net, metrics=fidelity_metrics(every=1)), plane.train_stream)
    names = published(strategy)
    for name in expected_names(2):
        assert names[f"fidelity_experience/{name}"][1][-1] == names[f"fidelity/{name}"][1][-1]


FIGURE = "fidelity/kappa_against_distance"


def test_tensorboard_holds_every_number_as_a_scalar_and_a_figure_an_experience(net, learner, train, plane, tmp_path):
    logger = TensorboardLogger(tb_log_dir=tmp_path)
    ewc = CurvatureEWCPlugin(2.0)
    metrics = fidelity_metrics(of=ewc, every=2, fraction=0.2)
    strategy = train(learner(net, ewc, metrics=metrics, loggers=[logger]), plane.train_stream)
    logger.writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    names = dict(published(strategy))
    steps, _ = names.pop(FIGURE)
    assert set(events.Tags()["scalars"]) == set(names)
    assert events.Tags()["images"] == [FIGURE]
    assert [event.step for event in events.Images(FIGURE)] == steps == [6, 9]
    assert not any(events.Tags()[kind] for kind in ("histograms", "tensors", "distributions"))
    for name, (steps, values) in names.items():
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == steps
        assert [event.value for event in scalars] == pytest.approx(values, rel=1e-6)


def test_the_figure_shows_what_was_measured_in_its_experience(net, learner, train, plane, tmp_path):
    metrics = fidelity_metrics(every=2)
    strategy = learner(net, metrics=metrics, loggers=[TensorboardLogger(tb_log_dir=tmp_path)], train_epochs=2)
    names = published(train(strategy, plane.train_stream))
    for end, figure in zip(*names[FIGURE]):
        lines = dict(zip(MODELS, figure.axes[0].get_lines()))
        for form, line in lines.items():
            shown = []
            for name in (f"{form.removesuffix('_linear')}/distance", f"{form}/kappa_abs"):
                steps, values = names[f"fidelity/{name}"]
                shown.append([value for step, value in zip(steps, values) if end - 6 <= step < end])
            assert len(shown[0]) == 3
            assert [list(axis) for axis in line.get_data()] == shown
        assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert [figure.axes[0].get_title()[-12:] for figure in names[FIGURE][1]] == ["experience 1", "experience 2"]


@pytest.mark.parametrize(("lr", "drawn"), [(0.1, False), (0.0, True)])
def test_no_figure_is_made_where_no_logger_draws_or_nothing_has_moved(lr, drawn, net, learner, train, plane, tmp_path):
    loggers = [TensorboardLogger(tb_log_dir=tmp_path)] if drawn else []
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    strategy = learner(net, metrics=fidelity_metrics(every=2), optimizer=sgd, loggers=loggers)
    assert FIGURE not in published(train(strategy, plane.train_stream))


def test_what_a_figure_will_show_survives_pickling_within_an_experience(net, learner, train, plane, tmp_path):
    class Restored(SupervisedPlugin):
        """Replaces the metric by its pickled copy after each iteration."""

        def after_training_iteration(self, strategy, **kwargs):
            copied = pickle.loads(pickle.dumps(strategy.evaluator.metrics[0]))
            strategy.evaluator.metrics[0].__dict__.update(copied.__dict__)

    figures = []
    for plugins in ([], [Restored()]):
        logger = TensorboardLogger(tb_log_dir=tmp_path)
        strategy = learner(copy.deepcopy(net), *plugins, metrics=fidelity_metrics(every=1), loggers=[logger])
        figures.append(published(train(strategy, plane.train_stream))[FIGURE][1])
    for once, restored in zip(*figures):
        for line, same in zip(once.axes[0].get_lines(), restored.axes[0].get_lines(), strict=True):
            assert (line.get_xydata() == same.get_xydata()).all()


def test_distances_are_those_from_each_own_anchor_and_from_the_newest(double, growing, learner, train, recorder):
    model, benchmark = growing(torch.float64)
    strategy = train(learner(model, recorder, metrics=fidelity_metrics(every=1)), benchmark.train_stream)
    last, now, ends = strategy.evaluator.get_last_metrics(), recorder.steps[-1], recorder.ends
    own = []
    for end in ends[:2]:  # what has grown since an anchor is cut to its shape
        past = PastFunction(end, None)
        own.append((past.vector(now) - past.vector(end)).norm().item())
    assert 0 < own[1] < own[0]
    for t, distance in enumerate(own):
        assert last[f"fidelity/accumulate/distance/experience_{t}"] == pytest.approx(distance, rel=1e-6)
    assert last["fidelity/accumulate/distance"] == pytest.approx(sum(own) / 2, rel=1e-6)
    assert last["fidelity/refresh/distance"] == pytest.approx(own[1], rel=1e-6)


def test_metrics_of_a_plugin_take_its_curvature_and_what_it_stores():
    ewc = CurvatureEWCPlugin(1.0, curvature=GGN(), policy=Refresh(fraction=0.3, seed=5))
    for metrics, (curvature, fraction, seed) in {
        fidelity_metrics(of=ewc)[0]: (GGN(), 0.3, 5),
        fidelity_metrics(of=ewc, curvature=Fisher(), fraction=0.5, seed=1)[0]: (Fisher(), 0.5, 1),
        fidelity_metrics(of=CurvatureEWCPlugin(1.0, policy=Merge()))[0]: (Fisher(), 0.1, 0),
        fidelity_metrics()[0]: (Fisher(), 0.1, 0),
    }.items():
        assert (metrics.past.curvature, metrics.fraction, metrics.seed) == (curvature, fraction, seed)


def test_a_curvature_without_per_example_form_is_refused_and_of_a_plugin_with_a_mended_hessian_the_plain_one_is_taken():
    (metric, *_) = fidelity_metrics(of=CurvatureEWCPlugin(1.0, curvature=Hessian(psd=Clip())))
    assert metric.past.curvature == Hessian()
    batched = BatchedEmpiricalFisher(batch_size=4)
    for options in ({"curvature": batched}, {"curvature": Hessian(psd=Clip())},
                    {"of": CurvatureEWCPlugin(1.0, curvature=batched)}):  # fmt: skip
        with pytest.raises(TypeError, match=r"single examples.* does not define.* Use GGN\(\), Fisher\(\), Empirical"):
            fidelity_metrics(**options)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_fraction_must_be_a_positive_part(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\]; got .* 0.1 keeps one example in ten"):
        fidelity_metrics(fraction=fraction)
