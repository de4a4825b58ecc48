"""What text loggers print of all metrics together, and what is said of measurements that cost more than training."""

import copy
import io
import json
import pickle
import re
import warnings

import pytest
import torch
from avalanche.benchmarks.scenarios import split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger, CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training.plugins import SupervisedPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from avalanche_curv import (
    CurvatureEWCPlugin,
    FromScratch,
    JSONLLogger,
    OrthogonalProjectionPlugin,
    fidelity_metrics,
    landscape_metrics,
    penalty_metrics,
    plasticity_metrics,
    projection_metrics,
)
from avalanche_curv.metrics import ScalarMetric, _cost


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def all_metrics():
    return [
        *fidelity_metrics(every=1), *landscape_metrics(every=1), *penalty_metrics(), *projection_metrics(every=1),
        *plasticity_metrics(every=1, from_scratch=FromScratch(sgd)), accuracy_metrics(epoch=True, experience=True),
    ]  # fmt: skip


class Everything(BaseLogger):
    """As WandBLogger and loggers of one's own are: it gets each value once, when it is there."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_single_metric(self, name, value, x_plot):
        self.seen.append((name, value, x_plot))


@pytest.fixture(scope="module")
def logged(make, learner, train, plane, tmp_path_factory):
    """A run with all metrics: the strategy, what a text logger prints, the folder of the others, and what a logger of
    one's own gets. In the second experience there are two epochs with a past."""
    folder, text, own = tmp_path_factory.mktemp("logs"), io.StringIO(), Everything()
    model = make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))
    loggers = [TextLogger(text), TensorboardLogger(folder), JSONLLogger(folder / "log"), CSVLogger(folder / "csv"), own]
    plugins = CurvatureEWCPlugin(1.0), OrthogonalProjectionPlugin()
    strategy = learner(model, *plugins, metrics=all_metrics(), loggers=loggers, train_epochs=2)
    train(strategy, plane.train_stream[:2], eval_streams=[])
    strategy.eval(plane.test_stream[:1])
    loggers[1].writer.close()
    loggers[2].close()
    return strategy, text.getvalue(), folder, own.seen


def printed(text):
    """The lines of metrics of this package under each heading of a text log."""
    parts = re.split(r"Epoch \d+ ended\.|> Eval on|-- >> End of eval", text)
    ours = r"\t(fidelity|growth|accuracy|penalty|landscape|gradient|plasticity|projection)"
    return [[line for line in part.splitlines() if re.match(ours, line)] for part in parts[1:]]


def test_text_logs_show_at_most_25_lines_of_all_metrics_and_hide_no_value_of_avalanche(logged):
    _, text, _, seen = logged
    parts = printed(text)
    assert len({name for name, *_ in seen}) > 250
    assert 20 <= max(map(len, parts)) <= 25
    last = "\n".join(parts[3])  # after the second epoch of the second experience
    values = {name: value for name, value, step in seen if step < 12}
    for name in ("fidelity/accumulate/kappa_abs", "accuracy/past_tasks", "penalty/weighted", "gradient/cosine",
                 "landscape/stored/sharpness", "plasticity/dormant_units", "projection/step_leakage"):  # fmt: skip
        assert f"\t{name} = {values[name]:.4f}" in last
    assert "experience_0" not in last
    assert len(re.findall(r"\tTop1_Acc_\S+ = ", text)) == 5  # four epochs and an evaluation


def test_other_loggers_and_the_evaluator_get_every_value_as_a_plain_float(logged):
    strategy, _, folder, seen = logged
    scalars = [one for one in seen if type(one[1]) is float]
    assert {name.rpartition("/")[2] for name, value, _ in seen if type(value) is not float} == {
        "kappa_against_distance", "spectrum", "log10_eigenvalues"
    }  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [(line["metric"], line["value"], line["step"]) for line in lines] == scalars
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert {*events.Tags()["scalars"]} == {name for name, *_ in scalars}
    assert sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"]) == len(scalars)
    assert len((folder / "csv" / "training_results.csv").read_text().splitlines()) == 1 + 4
    everything = strategy.evaluator.get_all_metrics()
    assert sum(len(values) for _, values in everything.values()) == len(seen)
    assert {*strategy.evaluator.get_last_metrics()} == {name for name, *_ in seen}


def test_the_interactive_logger_prints_as_few_lines(net, learner, train, plane, capsys):
    logger = InteractiveLogger()
    logger.file = io.StringIO()  # the bar keeps to the screen
    strategy = learner(net, metrics=[*fidelity_metrics(every=1), *plasticity_metrics(every=1)], loggers=[logger])
    train(strategy, plane.train_stream[:2], eval_streams=[])
    counts = [len(part) for part in printed(logger.file.getvalue())]
    assert counts[0] < counts[1] <= 16


def test_patterns_are_checked_and_a_metric_of_ones_own_prints_all(net, learner, train, plane):
    class Two(ScalarMetric):
        def after_training_iteration(self, strategy):
            return self.publish(strategy, {"own/a": 1.0, "own/b": 2.0}) if self.due(strategy) else []

    text, metric = io.StringIO(), Two(every=1)
    strategy = learner(net, metrics=[metric], loggers=[TextLogger(text)])
    train(strategy, plane.train_stream[:1], eval_streams=[])
    metric.in_text = ["own/b"]
    train(strategy, plane.train_stream[:1], eval_streams=[])
    assert re.findall(r"own/.", text.getvalue()) == ["own/a", "own/b", "own/b"]
    for wrong in ("own/*", 3, [3]):
        with pytest.raises(TypeError, match=r"in_text must be a list of patterns"):
            metric.in_text = wrong


# --- what a measurement costs ---


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when it is told to."""

    class Clock:
        seconds = 100.0

    monkeypatch.setattr(_cost, "now", lambda: Clock.seconds)
    return Clock


class Slow(ScalarMetric):
    def __init__(self, every, clock, seconds):
        super().__init__(every)
        self.clock, self.seconds = clock, seconds

    def after_training_iteration(self, strategy):
        if not self.due(strategy):
            return []
        self.clock.seconds += self.seconds
        return self.publish(strategy, {"slow/value": 1.0})


class Time(SupervisedPlugin):
    """Training takes `step` seconds an iteration; evaluations and the ends of experiences 1,000."""

    def __init__(self, clock, step):
        super().__init__()
        self.clock, self.step = clock, step

    def before_forward(self, strategy, **kwargs):
        self.clock.seconds += self.step

    def after_training_exp(self, strategy, **kwargs):
        self.clock.seconds += 1000

    def before_eval(self, strategy, **kwargs):
        self.clock.seconds += 1000


@pytest.fixture
def said(net, learner, train, plane, clock):
    """said(step, *(every, seconds), ...) -> the warnings of such metrics in a run of 3 experiences of 12 iterations,
    with an evaluation after each of 2 epochs."""

    def run(step, *costs, stream=None, **options):
        metrics = [Slow(every, clock, seconds) for every, seconds in costs]
        options = {"train_mb_size": 8, "train_epochs": 2, "eval_every": 1, **options}
        strategy = learner(net, Time(clock, step), metrics=metrics, **options)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            train(strategy, stream or plane.train_stream, eval_streams=[plane.test_stream[:1]])
        return [str(one.message) for one in found if "Measuring" in str(one.message)]

    return run


def test_a_measurement_longer_than_the_training_between_two_of_them_is_said_once_with_the_remedy(said):
    (message,) = said(1.0, (4, 5.0))
    assert "Measuring slow/... takes 5 s, longer than the training between two measurements, 4 s for every=4" in message
    assert "With every=50 it would be a tenth" in message
    assert "Slow" in message


@pytest.mark.parametrize(("step", "every", "seconds", "suggested"), [
    (1.0, 1, 3.1, 40), (0.01, 2, 2.0, 2000), (2.0, 3, 6.5, 40), (1.0, 4, 4.0, None), (1.0, 6, 5.0, None),
])  # fmt: skip
def test_the_number_that_is_suggested_makes_it_a_tenth(step, every, seconds, suggested, said):
    found = said(step, (every, seconds))
    assert [int(re.search(r"With every=(\d+)", one).group(1)) for one in found] == ([suggested] if suggested else [])
    if suggested:
        assert seconds <= 0.1 * suggested * step < 2 * seconds


def test_what_others_measure_does_not_count_as_training(said):
    """Two of 3 seconds every iteration between steps of 2 seconds: each is longer than the training alone."""
    found = said(2.0, (1, 3.0), (1, 3.0))
    assert len(found) == 2
    assert all("2 s for every=1. With every=20 it" in one for one in found)


def test_nothing_is_said_of_less_than_five_seconds_in_all(said):
    assert not said(1e-6, (1, 0.13))  # 36 measurements: 4.7 s
    assert said(1e-6, (1, 0.14))


def test_an_online_stream_of_single_iterations_is_timed_too(said, plane):
    parts = list(split_online_stream(plane.train_stream[:1], 8, access_task_boundaries=True, seed=0))
    (message,) = said(1.0, (1, 2000.0), stream=parts, train_epochs=1, eval_every=-1)
    assert "Measuring slow/... takes 2e+03 s" in message


def test_a_copy_counts_anew_but_does_not_say_it_again(clock):
    metric = Slow(1, None, 5.0)
    metric._cost.spent, metric._cost.said = 7.0, True
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert copied._cost.said
        assert copied._cost.spent == 0.0
