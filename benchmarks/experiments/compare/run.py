"""One run of the comparison or of its tuning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks.scenarios.dataset_scenario import split_validation_class_balanced
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import Fisher, fidelity_metrics
from avalanche_curv.core import NonFiniteCurvatureError
from avalanche_curv.streams._benchmark import assembled
from benchmarks.experiments.compare.setting import Setting
from benchmarks.harness import Context, Record
from benchmarks.methods import Learner, Method
from benchmarks.storage import stored_bytes
from benchmarks.streams import STREAMS
from benchmarks.training import Steps, TimedEvaluation, Trainer, logged, mean, summary

CURVES = [
    f"{group}/{model}/{measure}"
    for group in ("fidelity", "fidelity_trajectory")
    for model in ("accumulate", "refresh", "accumulate_linear", "refresh_linear")
    for measure in ("kappa", "kappa_abs", "gamma", "alpha", "rho_pooled")
] + ["penalty/raw", "penalty/weighted", "accuracy/stored", "accuracy/current_task", "accuracy/past_tasks"]


def run(method: Method, setting: Setting, seed: int, context: Context) -> list[Record]:
    """Train on all experiences; accuracy on the test set of each one seen after each of them. Where weights or their
    curvature diverge the run has no average accuracy (nan)."""
    data = data_for(setting, seed, context.dataset_root)
    torch.manual_seed(seed)  # the stream may have drawn: every method starts from the same weights
    trainer = build(method, setting, data, context)
    strategy, evaluation = trainer.strategy, trainer.evaluation
    try:
        records = list(course(trainer, data.benchmark, joint=method.joint))
    except NonFiniteCurvatureError:
        return [{"metric": "average_accuracy", "value": nan}]
    scalars = accuracies(trainer.rows, strategy.model)
    scalars |= {"seconds": trainer.seconds, "metric_seconds": evaluation.seconds}
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


def build(method: Method, setting: Setting, data: Data, context: Context) -> Trainer:
    """The strategy of a method, with metrics that draw nothing and TensorBoard files."""
    model = STREAMS[setting.stream].model(setting.scenario)
    metrics: Sequence[Any] = accuracy_metrics(experience=True)
    if setting.fidelity_every and method.has_example_loss:
        fidelity = fidelity_metrics(
            curvature=Fisher(), every=setting.fidelity_every, fraction=setting.memory, stream=data.benchmark.test_stream
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
    return Trainer(method.build(learner), evaluation)


def course(trainer: Trainer, benchmark: Any, *, joint: bool) -> Iterator[Record]:
    """Train on one experience after another, or on all of them at once; after each the accuracies on those seen."""
    if joint:
        trainer.train(benchmark.train_stream)
        yield from _measured(trainer, benchmark.test_stream)
        return
    for number, experience in enumerate(benchmark.train_stream, start=1):
        trainer.train(experience)
        yield from _measured(trainer, benchmark.test_stream[:number])


def _measured(trainer: Trainer, tests: Any) -> Iterator[Record]:
    """Accuracy as the strategy itself evaluates, which matters to methods with a prediction of their own."""
    found = trainer.strategy.eval(tests)
    values = {int(name.rpartition("Exp")[2]): float(value) for name, value in found.items() if "Top1_Acc_Exp" in name}
    row = [values[number] for number in range(len(tests))]
    trainer.rows.append(row)
    step = trainer.strategy.clock.train_iterations
    for k, value in enumerate(row):
        yield {"metric": f"accuracy/experience_{k}", "value": value, "step": step}
    yield {"metric": "accuracy/seen", "value": mean(row), "step": step}


@dataclass(frozen=True)
class Data:
    """An Avalanche benchmark, and the number of training examples of the whole stream, of which it may be the start."""

    benchmark: Any
    examples: int


def data_for(setting: Setting, seed: int, dataset_root: Path | None) -> Data:
    """The first experiences of the stream; in tuning their test stream is what was held out of training, the same part
    of each class."""
    found = STREAMS[setting.stream].make(seed, dataset_root, setting.scenario)
    examples = sum(len(experience.dataset) for experience in found.train_stream)
    train, test = (_datasets(stream, setting.experiences) for stream in (found.train_stream, found.test_stream))
    if setting.validation:
        torch.manual_seed(seed)
        pairs = [split_validation_class_balanced(setting.validation, dataset) for dataset in train]
        train, test = (list(part) for part in zip(*pairs))
    if setting.test_limit is not None:
        test = [_at_most(setting.test_limit, dataset) for dataset in test]
    return Data(assembled(train, test, classes(train)), round(examples * (1 - setting.validation)))


def classes(datasets: Sequence[Any]) -> int:
    """How many outputs they speak of."""
    return 1 + max(int(torch.as_tensor(list(dataset.targets)).max()) for dataset in datasets)


def _datasets(stream: Any, count: int) -> list[Any]:
    return [experience.dataset for experience in list(stream)[:count]]


def _at_most(limit: int, dataset: Any) -> Any:
    """The first of a fixed shuffle."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return dataset.subset(order[:limit].tolist())
