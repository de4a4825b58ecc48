import copy
import math
import pickle
import re
import warnings

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.logging import TensorboardLogger
from avalanche.models import avalanche_forward
from avalanche.training import Naive, Replay
from avalanche.training.plugins import SupervisedPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    GGN,
    CurvatureEWC,
    CurvatureEWCPlugin,
    Dense,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    GramMatrix,
    Hessian,
    Lanczos,
    LowRank,
    Merge,
    ParameterSpace,
    Rank,
    Refresh,
    fidelity_metrics,
    landscape_metrics,
)
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.metrics import landscape as landscape_file
from avalanche_curv.metrics.landscape import part_within

NUMBERS = ("sharpness", "trace", "numerical_rank", "effective_rank", "energy", "exact")
MOTION = ("alignment", "leakage")
QUICK = Lanczos(probes=1, steps=5)


def published(strategy):
    return strategy.evaluator.get_all_metrics()


# --- values on paper: the empirical Fisher from one gradient after the other ---


def gradients(model, parts):
    """The gradient of each example of (inputs, targets, task label or None) at its own label, in eval mode."""
    model = copy.deepcopy(model).eval()
    rows = []
    for inputs, targets, task in parts:
        for x, y in zip(inputs, targets):
            labels = torch.zeros(1, dtype=torch.long) if task is None else torch.tensor([task])
            loss = cross_entropy(avalanche_forward(model, x[None], labels), y[None])
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in found]))
    return torch.stack(rows)


def with_parameters_of(past, later):
    """The past function at the parameters of a model that may have grown since."""
    moved, values = copy.deepcopy(past), dict(later.named_parameters())
    for name, parameter in moved.named_parameters():
        parameter.data = values[name].data[tuple(slice(n) for n in parameter.shape)].clone()
    return moved


def vector(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def share(rows, change):
    """‖V s‖ / ‖s‖."""
    return float((rows @ change).norm() / change.norm())


def changed(then, now, k):
    """tr C_now / tr C_then, and the overlap of their top subspaces."""
    overlap = float((top_of(then, k) @ top_of(now, k).T).square().sum() / k)
    return {"trace_ratio": float(now.square().sum() / then.square().sum()), "overlap": overlap}


def numbers_on_paper(rows, k, epsilon):
    values = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0).clamp_min(0)
    p = values[values > 0] / values.sum()
    return {
        "sharpness": float(values[0]),
        "trace": float(rows.square().sum() / len(rows)),
        "numerical_rank": float((values > epsilon * values[0]).sum()),
        "effective_rank": math.exp(-float((p * p.log()).sum())),
        "energy": float(values[:k].sum() / values.sum()),
        "exact": 1.0,
    }


def top_of(rows, k):
    return torch.linalg.eigh(rows.T @ rows / len(rows)).eigenvectors[:, -k:].T


@pytest.mark.parametrize("options", [{"methods": [GramMatrix()]}, {"fraction": 0.5, "max_rows": 20}], ids=str)
@pytest.mark.filterwarnings("ignore:landscape_metrics measures")
def test_values_equal_those_of_the_explicit_matrix(
    options, double, growing, learner, train, examples, recorder, monkeypatch
):
    """Of at most 20 rows: 20 of the 25 current examples, and 10 of the 25 stored ones of each past experience."""
    monkeypatch.setattr(landscape_file, "FEWEST", 1)
    options, seed, k = {"fraction": 0.1, **options}, 7, 4
    model, benchmark = growing(torch.float64)
    metrics = landscape_metrics(curvature=EmpiricalFisher(), seed=seed, every=1, k=k, **options)
    strategy = train(learner(model, recorder, metrics=metrics, train_mb_size=25), benchmark.train_stream)
    heads = not isinstance(model, nn.Sequential)
    parts = []
    for number, experience in enumerate(benchmark.train_stream):
        inputs, targets = examples(experience)
        kept = random_part(50, options["fraction"], part_seed(seed, number))
        if "max_rows" in options:
            fraction, place = (20 / 25, 0) if number == 2 else (20 / 50, number)
            kept = kept[random_part(25, fraction, part_seed(seed + 1, place))]
        parts.append((inputs[kept], targets[kept], number if heads else None))
    # at the last iteration, in the third experience of two iterations
    before, now, past = recorder.steps[-2], recorder.steps[-1], recorder.ends[1]
    then, moved = gradients(past, parts[:2]), with_parameters_of(past, now)
    rows = {"current": gradients(now, parts[2:]), "stored": gradients(moved, parts[:2])}
    names = published(strategy)
    for which, some in rows.items():
        expected = numbers_on_paper(some, k, 1e-2)
        for group in ("landscape", "landscape_experience"):
            got = {name: names[f"{group}/{which}/{name}"][1][-1] for name in expected}
            assert got == pytest.approx(expected, rel=1e-6), which
    top = top_of(then, k)
    for name, start in (("step", with_parameters_of(past, before)), ("drift", past)):
        inside = share(top, vector(moved) - vector(start))
        assert names[f"landscape/{name}/alignment"][1][-1] == pytest.approx(inside, rel=1e-6)
        assert names[f"landscape/{name}/leakage"][1][-1] == pytest.approx((1 - inside**2) ** 0.5, rel=1e-6)
    for name, value in changed(then, rows["stored"], k).items():
        assert names[f"landscape/drift/{name}"][1][-1] == pytest.approx(value, rel=1e-6)


def test_without_a_past_the_start_of_the_experience_takes_its_place(double, net, learner, train, examples, plane):
    net.double().register_forward_pre_hook(lambda module, args: (args[0].double(),))
    start, stream = copy.deepcopy(net), list(plane.train_stream[:1])
    inputs, targets = examples(stream[0])
    kept = random_part(48, 0.25, part_seed(0, 0))
    metrics = landscape_metrics(curvature=EmpiricalFisher(), fraction=0.25, every=1, k=3)
    last = train(learner(net, metrics=metrics), stream).evaluator.get_last_metrics()
    rows = [gradients(model, [(inputs[kept], targets[kept], None)]) for model in (start, net)]
    expected = {"alignment": share(top_of(rows[0], 3), vector(net) - vector(start)), **changed(*rows, 3)}
    assert {name: last[f"landscape/drift/{name}"] for name in expected} == pytest.approx(expected)


class Written(SupervisedPlugin):
    """Both gradients of every step: the task's by autograd of its loss alone, the penalty's by plain operations."""

    def __init__(self, *ewcs):
        super().__init__()
        self.ewcs, self.values = ewcs, []

    def before_backward(self, strategy, **kwargs):
        parameters = dict(strategy.model.named_parameters())
        inputs = list(parameters.values())
        task = torch.autograd.grad(
            strategy.criterion(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        penalty = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for ewc in self.ewcs:
            past = ewc.past.model
            if past is None:
                continue
            corners = [tuple(slice(n) for n in shape) for shape in past.space.shapes]
            read = [parameters[name].detach()[corner] for name, corner in zip(past.space.names, corners)]
            delta = torch.cat([p.reshape(-1) for p in read]) - past.anchor
            slope = past.curvature.dense() @ delta + (0 if past.gradient is None else past.gradient)
            pieces = (ewc.strength * slope).split([p.numel() for p in read])
            for name, corner, part, p in zip(past.space.names, corners, pieces, read):
                penalty[name][corner] += part.view_as(p)
        a, b = (torch.cat([p.reshape(-1) for p in parts]) for parts in (task, penalty.values()))
        cosine = float(a @ b / (a.norm() * b.norm()))
        self.values.append((float(a.norm()), float(b.norm()), cosine))


@pytest.mark.parametrize("twice", [False, True])
def test_both_gradients_equal_those_of_both_losses(twice, double, growing, learner, train):
    model, benchmark = growing(torch.float64)
    ewcs = [CurvatureEWCPlugin(8.0, guard=None, policy=Refresh(0.5, gradient=True))]
    if twice:
        ewcs.append(CurvatureEWCPlugin(2.0, guard=None, structure=LowRank(Rank(2)), policy=Merge(decay=0.5)))
    written = Written(*ewcs)
    metrics = landscape_metrics(curvature=EmpiricalFisher(), every=1)[1:]
    names = published(train(learner(model, written, *ewcs, metrics=metrics), benchmark.train_stream))
    task, penalty, cosine = zip(*written.values)
    assert names["gradient/task_norm"][1] == pytest.approx(task, rel=1e-9)
    assert names["gradient/penalty_norm"][0] == list(range(3, 9))
    assert names["gradient/penalty_norm"][1] == pytest.approx(penalty[3:], rel=1e-9)
    first = 3 if abs(penalty[3]) > 0 else 4  # at the anchor the penalty of the second plugin is flat
    assert names["gradient/cosine"][1] == pytest.approx(cosine[first:], rel=1e-9)


def test_without_a_penalty_there_is_only_the_gradient_of_the_task(net, learner, train, plane):
    strategy = train(learner(net, metrics=landscape_metrics(every=1)[1:]), plane.train_stream)
    assert set(published(strategy)) == {"gradient/task_norm"}
    still = train(learner(net, CurvatureEWCPlugin(0.0), metrics=landscape_metrics(every=1)[1:]), plane.train_stream)
    assert set(published(still)) == {"gradient/task_norm", "gradient/penalty_norm"}
    assert set(published(still)["gradient/penalty_norm"][1]) == {0.0}


# --- at most so many rows ---


def test_a_limit_that_takes_effect_is_said_once(net, learner, train, plane):
    """Three experiences of 48 examples of two classes, with a row each; after two of them 96 are stored."""

    def trained(most):
        metrics = landscape_metrics(every=2, fraction=1.0, max_rows=most)
        return published(train(learner(copy.deepcopy(net), metrics=metrics), plane.train_stream))

    landscape_limit = r"a random 40 of 48 examples.* have 48 rows, more than max_rows=40.*Give max_rows=None"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landscape_file, "FEWEST", 1)
        with pytest.warns(UserWarning, match=landscape_limit) as said:
            trained(40)
    assert len([one for one in said if "max_rows" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "landscape_metrics")
        assert trained(96) == trained(None)


def test_few_examples_of_many_classes_are_not_made_fewer(make):
    """Of 120 examples with 30 rows each, 100 remain; of a kind without rows the examples count."""
    data = torch.randn(120, 2), torch.randint(31, (120,))
    risk = EmpiricalRisk.snapshot(make(lambda: nn.Linear(2, 31)), nn.CrossEntropyLoss(), [data])
    for curvature, most, expected in ((Fisher(), 300, 100), (Fisher(), 3300, 110), (Fisher(), 3600, 120),
                                      (Hessian(), 110, 110), (Fisher(), None, 120)):  # fmt: skip
        (part,) = part_within(curvature, [risk], most, seed=3)
        assert part.examples == expected
    (part,) = part_within(Hessian(), [risk], 110, seed=3)
    kept = random_part(120, 110 / 120, part_seed(4, 0))
    assert torch.equal(torch.cat([x for x, _ in part]), data[0][kept])
    halves = part_within(Fisher(), [risk, risk], 3600, seed=3)
    assert [half.examples for half in halves] == [60, 60]


# --- what is published, and when ---


def expected_names(kind):
    for group in ("landscape", "landscape_experience"):
        yield from (f"{group}/{which}/{name}" for which in ("current", "stored") for name in NUMBERS)
        yield from (f"{group}/drift/{name}" for name in (*MOTION, "trace_ratio", "overlap"))
    yield from (f"landscape/step/{name}" for name in MOTION)
    yield "gradient/task_norm"
    if kind is CurvatureEWC:
        yield from ("gradient/penalty_norm", "gradient/cosine")


@pytest.mark.parametrize("kind", [Replay, CurvatureEWC])
def test_every_strategy_and_head_publishes_the_same_names_and_python_floats(kind, growing, learner, train):
    model, benchmark = growing()
    options = {Replay: {"mem_size": 20}, CurvatureEWC: {"strength": 1.0}}.get(kind, {})
    strategy = learner(model, kind=kind, metrics=landscape_metrics(every=2, fraction=0.2), **options)
    names = published(train(strategy, benchmark.train_stream))
    assert set(names) == set(expected_names(kind))
    for _, values in names.values():
        assert all(type(value) is float and math.isfinite(value) for value in values)
    for name in ("step", "drift"):
        for inside, leakage in zip(*(names[f"landscape/{name}/{part}"][1] for part in MOTION)):
            assert inside**2 + leakage**2 == pytest.approx(1, abs=1e-4)


def test_every_n_counts_from_the_first_of_the_six_iterations_of_each_experience(net, learner, train, plane):
    names = published(train(learner(net, metrics=landscape_metrics(every=4), train_epochs=2), plane.train_stream))
    for name in ("current/trace", "step/alignment", "drift/overlap"):
        assert names[f"landscape/{name}"][0] == names["gradient/task_norm"][0] == [0, 4, 6, 10, 12, 16]
    assert names["landscape/stored/trace"][0] == [6, 10, 12, 16]
    assert names["landscape_experience/current/trace"][0] == [6, 12, 18]
    assert names["landscape_experience/stored/trace"][0] == [12, 18]


def test_the_end_of_an_experience_is_measured_before_it_becomes_past(net, learner, train, plane):
    names = published(train(learner(net, metrics=landscape_metrics(every=1)), plane.train_stream))
    ends = [name for name in names if name.startswith("landscape_experience/")]
    assert len(ends) == 16
    for name in ends:
        assert names[name][1][-1] == names[name.replace("_experience", "")][1][-1]


def test_the_examples_are_those_of_the_fidelity_metrics(net, learner, train, plane):
    shape, (fidelity, *_) = landscape_metrics(fraction=0.3, seed=5)[0], fidelity_metrics(fraction=0.3, seed=5)
    train(learner(net, metrics=[shape, fidelity]), plane.train_stream)
    assert len(shape._stored) == 3
    for own, other in zip(shape._stored, fidelity.past.refresh):
        for a, b in zip(next(iter(own)), next(iter(other))):
            assert torch.equal(a, b)
        assert torch.equal(own.anchor, other.anchor)


def test_an_online_stream_has_its_landscape_over_the_whole_task(net, learner, train, plane):
    parts = list(split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0))
    metric = landscape_metrics(every=2, fraction=0.25)[0]
    names = published(train(learner(net, metrics=[metric], train_mb_size=8), parts))  # 3 parts of 2 iterations
    assert names["landscape/current/trace"][0] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert names["landscape/stored/trace"][0] == [6, 8, 10, 12, 14, 16]
    assert names["landscape_experience/current/trace"][0] == [6, 12, 18]
    step, drift = (names[f"landscape/{name}/alignment"][1][:2] for name in ("step", "drift"))
    assert step[0] == drift[0]
    assert step[1] != drift[1]  # which goes back to the start of the task
    assert [risk.examples for risk in metric._stored] == [12, 12, 12]


def test_spectra_are_drawn_for_tensorboard(net, learner, train, plane, tmp_path):
    logger = TensorboardLogger(tb_log_dir=tmp_path)
    metrics = landscape_metrics(every=2, fraction=0.2)
    strategy = train(learner(net, metrics=metrics, loggers=[logger]), plane.train_stream)
    logger.writer.close()
    tags = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload().Tags()
    assert set(tags["images"]) == {"landscape/current/spectrum", "landscape/stored/spectrum"}
    assert set(tags["histograms"]) == {f"landscape/{which}/log10_eigenvalues" for which in ("current", "stored")}
    assert set(tags["scalars"]) == set(expected_names(Naive))
    names = published(strategy)
    figures = names["landscape/stored/spectrum"]
    assert figures[0] == [6, 9]
    (axes,) = figures[1][-1].axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    title = axes.get_title()
    assert "Fisher" in title
    assert re.search(r"of 20 (current|stored) examples", title)
    assert re.match(r"all by (eigendecomposition of all|Gram matrix of) \d+ rows", axes.figure.get_supxlabel())
    drawn = sum(bar.get_height() for bar in axes.patches)
    logs = names["landscape/stored/log10_eigenvalues"][1][-1]
    assert drawn == pytest.approx(len(logs), abs=1)
    assert float(10 ** logs.max()) == pytest.approx(names["landscape_experience/stored/sharpness"][1][-1], rel=1e-5)


def test_the_histogram_of_a_quadrature_and_of_an_indefinite_matrix(net, learner, train, plane, tmp_path):
    lanczos = {"methods": [Lanczos()]}
    for curvature, methods in ((Hessian(), {}), (Hessian(), lanczos), (Fisher(), lanczos)):
        metrics = landscape_metrics(curvature=curvature, every=9, fraction=0.2, **methods)
        logger = TensorboardLogger(tb_log_dir=tmp_path)
        names = published(train(learner(net, metrics=metrics, loggers=[logger]), plane.train_stream[:1]))
        logs = names["landscape/current/log10_eigenvalues"][1][0]
        assert 0 < len(logs) <= 27
        assert names["landscape_experience/current/exact"][1] == [0.0 if methods else 1.0]
        axes = names["landscape/current/spectrum"][1][0].axes[0]
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(len(logs), abs=1)
        labels = axes.get_legend_handles_labels()[1]
        assert labels == (["positive", "negative"] if curvature == Hessian() else ["positive"])


# --- no trace ---


@pytest.mark.parametrize(
    ("ways", "drawn"),
    [([{}], True), ([{"methods": [QUICK], "curvature": Hessian()}, {"methods": [GramMatrix()]}], False)],
    ids=["drawn", "by other methods"],
)
def test_measuring_trains_bit_identically_to_naive(ways, drawn, assert_leaves_no_trace, tmp_path):
    metrics = [metric for options in ways for metric in landscape_metrics(every=2, fraction=0.5, **options)]
    assert_leaves_no_trace(metrics, loggers=[TensorboardLogger(tb_log_dir=tmp_path)] if drawn else [])


def test_a_step_that_is_not_measured_reads_no_parameters(net, learner, train, plane, monkeypatch):
    read = []
    strategy = learner(net, metrics=landscape_metrics(every=4), train_epochs=2)
    original = ParameterSpace.vector

    def spied(space, model):
        if model is strategy.model:
            read.append(strategy.clock.train_iterations)
        return original(space, model)

    monkeypatch.setattr(ParameterSpace, "vector", spied)
    train(strategy, plane.train_stream)
    assert set(read) == {0, 4, 6, 10, 12, 16, 18}  # 6, 12 and 18 are ends of experiences, too
    assert strategy.evaluator.metrics[0]._before is None


@pytest.mark.parametrize("methods", [{}, {"methods": [QUICK]}])
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(methods, assert_resumes):
    assert_resumes(landscape_metrics(every=2, fraction=0.2, **methods))


def test_the_metric_can_be_pickled_with_what_it_stores(net, learner, train, plane):
    metric = landscape_metrics(every=2)[0]
    train(learner(net, metrics=[metric]), plane.train_stream)
    assert metric._reference is not None
    copied = pickle.loads(pickle.dumps(metric))
    assert "_reference" not in copied.__dict__
    assert copied._reference.numbers() == metric._reference.numbers()


# --- what cannot be measured ---


def test_a_run_that_diverges_goes_on_without_landscapes(net, learner, train, plane):
    wild = torch.optim.SGD(net.parameters(), lr=math.inf)
    metrics = landscape_metrics(every=1)
    names = published(train(learner(net, metrics=metrics, optimizer=wild), plane.train_stream))
    assert not {"landscape/stored/trace", "landscape/current/trace"} & {*names}
    assert not any(math.isnan(value) for _, values in names.values() for value in values)


def test_a_step_of_zero_has_no_alignment(net, learner, train, plane):
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    names = published(train(learner(net, metrics=landscape_metrics(every=1), optimizer=still), plane.train_stream))
    assert not [name for name in names if name.startswith(("landscape/step/", "landscape/drift/a"))]
    assert names["landscape/drift/trace_ratio"][1] == pytest.approx([1.0] * 9, rel=1e-6)
    assert names["landscape/drift/overlap"][1] == pytest.approx([1.0] * 9, rel=1e-5)


def test_a_criterion_that_the_curvature_is_not_of_is_refused_before_training(net, learner, train, plane):
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="log-likelihood"):
        train(learner(net, metrics=landscape_metrics(), criterion=weighted), plane.train_stream)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"fraction": 1.5}, ValueError, r"fraction must lie in \(0, 1\]; got 1.5. 0.1 keeps one example in ten"),
        ({"curvature": GGN}, TypeError, r"Did you mean GGN\(\)"),
        ({"curvature": Dense()}, TypeError, "A landscape is that of a Curvature; got Dense"),
    ],
)
def test_unusable_options_are_refused_before_training(options, kind, message):
    with pytest.raises(kind, match=message):
        landscape_metrics(**options)
