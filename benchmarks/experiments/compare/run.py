"""One run of the comparison: a method on a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import Fisher, fidelity_metrics
from avalanche_curv.core import NonFiniteCurvatureError
from benchmarks.experiments.compare.data import Data, classes, data_for
from benchmarks.harness.experiment import Context, Record
from benchmarks.methods import Learner, Method
from benchmarks.storage import stored_bytes
from benchmarks.streams import STREAMS
from benchmarks.training import Steps, TimedEvaluation, logged, mean, summary

if TYPE_CHECKING:
    from benchmarks.experiments.compare import Setting

CURVES = [
    f"{group}/{picture}/{measure}"
    for group in ("fidelity", "fidelity_trajectory")
    for picture in ("accumulate", "refresh", "accumulate_linear", "refresh_linear")
    for measure in ("kappa", "kappa_abs", "gamma", "alpha", "rho_pooled")
] + ["penalty/raw", "penalty/weighted", "accuracy/stored", "accuracy/current_task", "accuracy/past_tasks"]


def run(method: Method, setting: Setting, seed: int, context: Context) -> list[Record]:
    """Train on all experiences; accuracy on the test set of each one seen after each of them. Where weights or their
    curvature diverge the run has no average accuracy (nan)."""
    data = data_for(setting, seed, context.dataset_root)
    torch.manual_seed(seed)  # the stream may have drawn: every method starts from the same weights
    strategy, evaluation = build(method, setting, data, context)
    course = Course(strategy, evaluation)
    try:
        records = course.joint(data.benchmark) if method.joint else course.sequence(data.benchmark)
    except NonFiniteCurvatureError:
        return [{"metric": "average_accuracy", "value": nan}]
    scalars = accuracies(course.rows, strategy.model)
    scalars |= {"seconds": course.seconds, "metric_seconds": evaluation.seconds}
    scalars["stored_bytes"] = float(stored_bytes(strategy))
    scalars["weights"] = float(sum(p.detach().double().sum() for p in strategy.model.parameters()))  # tells equal runs
    records += [{"metric": name, "value": value} for name, value in scalars.items()]
    return records + logged(evaluation, CURVES)


def accuracies(rows: list[list[float]], model: nn.Module) -> dict[str, float]:
    """What a run comes to: `summary`, of a method that learns all at once its accuracy alone, and no number of weights
    that have diverged, by which the network predicts the first class."""
    if not all(p.isfinite().all() for p in model.parameters()):
        return {"average_accuracy": nan}
    return summary(rows) if len(rows) > 1 else {"average_accuracy": mean(rows[-1])}


def build(method: Method, setting: Setting, data: Data, context: Context) -> tuple[Any, TimedEvaluation]:
    """The strategy of a method and its evaluation, with metrics that draw nothing and TensorBoard files."""
    model = STREAMS[setting.stream].model(setting.scenario)
    metrics: Sequence[Any] = accuracy_metrics(experience=True)
    if setting.every and method.pictured:
        fidelity = fidelity_metrics(
            curvature=Fisher(), every=setting.every, fraction=setting.memory, stream=data.benchmark.test_stream
        )
        metrics = [*metrics, *fidelity]
    evaluation = TimedEvaluation(*metrics, loggers=[TensorboardLogger(context.tensorboard_dir)])
    datasets = [experience.dataset for experience in data.benchmark.train_stream]
    learner = Learner(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=setting.rate, fused=True),
        criterion=nn.CrossEntropyLoss(),
        batch=setting.batch,
        epochs=setting.steps,  # at least one step each: `Steps` ends the experience
        examples=data.examples,
        classes=classes(datasets),
        plugins=(Steps(setting.steps * (len(datasets) if method.joint else 1)),),
        evaluator=evaluation,
    )
    return method.build(learner), evaluation


class Course:
    """Trains a strategy, and knows seconds and the accuracies a[t][j] on experience j after experience t, j ≤ t."""

    def __init__(self, strategy: Any, evaluation: TimedEvaluation) -> None:
        self.strategy, self.evaluation = strategy, evaluation
        self.seconds = 0.0
        self.rows: list[list[float]] = []

    def sequence(self, benchmark: Any) -> list[Record]:
        """One experience after another."""
        records: list[Record] = []
        for number, experience in enumerate(benchmark.train_stream):
            self._train(experience)
            records += self._measure(benchmark.test_stream[: number + 1])
        return records

    def joint(self, benchmark: Any) -> list[Record]:
        """All experiences at once."""
        self._train(benchmark.train_stream)
        return self._measure(benchmark.test_stream)

    def _train(self, experiences: Any) -> None:
        """`seconds` grows by the time of training alone, without metrics and loggers."""
        before, start = self.evaluation.seconds, time.perf_counter()
        self.strategy.train(experiences, eval_streams=[])
        self.seconds += time.perf_counter() - start - (self.evaluation.seconds - before)

    def _measure(self, tests: Any) -> list[Record]:
        """Accuracy as the strategy itself evaluates, which matters to methods that predict in a way of their own."""
        found = self.strategy.eval(tests)
        values = {
            int(name.rpartition("Exp")[2]): float(value) for name, value in found.items() if "Top1_Acc_Exp" in name
        }
        row = [values[number] for number in range(len(tests))]
        self.rows.append(row)
        step = self.strategy.clock.train_iterations
        records: list[Record] = [
            {"metric": f"accuracy/experience_{k}", "value": value, "step": step} for k, value in enumerate(row)
        ]
        return [*records, {"metric": "accuracy/seen", "value": mean(row), "step": step}]
