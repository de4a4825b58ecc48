"""What the comparison and its tuning share: the setting of a stream, the options that choose it, and one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Annotated, Any

import torch
from avalanche.benchmarks.scenarios.dataset_scenario import split_validation_class_balanced
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import Fisher, fidelity_metrics
from avalanche_curv.core import NonFiniteCurvatureError
from avalanche_curv.streams._benchmark import assembled
from benchmarks.harness import Context, Options, Record, UsageError
from benchmarks.harness.options import one_of, positive
from benchmarks.methods import Learner, Method
from benchmarks.storage import stored_bytes
from benchmarks.streams import SCENARIOS, STREAMS
from benchmarks.training import Steps, TimedEvaluation, Trainer, logged, mean, summary

DEFAULT_STREAM = "permuted_digits"
MEASUREMENTS = 6  # of fidelity in each experience
STREAM, FIRST = PROTOCOLS = ("stream", "first")
EXPERIENCES = 3  # that tuning on the first ones sees
FIRST_SEED = 1000  # of tuning
CURVES = [
    f"{group}/{model}/{measure}"
    for group in ("fidelity", "fidelity_trajectory")
    for model in ("accumulate", "refresh", "accumulate_linear", "refresh_linear")
    for measure in ("kappa", "kappa_abs", "gamma", "alpha", "rho_pooled")
] + ["penalty/raw", "penalty/weighted", "accuracy/stored", "accuracy/current_task", "accuracy/past_tasks"]


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Fidelity is measured every `fidelity_every` steps, 0 for never; `memory` is the part of the training examples that
    methods with a memory store, and that fidelity looks at; `validation` the part that is held out of them and tested
    on in place of the test stream, in tuning.
    """

    stream: str
    scenario: str
    experiences: int
    steps: int
    batch: int
    rate: float
    fidelity_every: int
    memory: float = 0.1
    test_limit: int | None = None
    validation: float = 0.0


@dataclass(frozen=True)
class Config:
    """A strategy, by its name, in one setting; `tuned_on` says where its strength was chosen, if it has one."""

    label: str
    strategy: str
    method: Method
    setting: Setting
    tuned_on: str | None = None


@dataclass(frozen=True)
class StreamOptions(Options):
    """The options of the comparison and of its tuning; None is what the stream has, and no strategy is all."""

    stream: Annotated[str, one_of("stream", STREAMS)] = DEFAULT_STREAM
    """what is learned; see the manual"""
    scenario: Annotated[str | None, one_of("scenario", SCENARIOS)] = None
    """task-, domain- or class-incremental; default: the stream's first"""
    strategy: tuple[str, ...] = ()
    """one strategy, by its name in the table; repeatable; default: all"""
    steps: Annotated[int | None, positive()] = None
    """of an experience; default: the literature's"""
    first: Annotated[int | None, positive("K")] = None
    """experiences that are tuned on with the protocol first; default: 3"""

    def variant(self, suffix: str = "") -> str:
        """A folder's suffix for stream, scenario and steps where they are not the default."""
        usual = STREAMS[self.stream].scenarios[0]
        parts = [
            "" if self.stream == DEFAULT_STREAM else self.stream,
            "" if self.scenario in (None, usual) else self.scenario,
            f"{self.steps}steps" if self.steps else "",
            suffix,
        ]
        return "-".join(part for part in parts if part)

    def setting(self, every: int | None = None) -> Setting:
        """The setting of the stream, with fidelity `every` so many steps; with `quick`, two experiences of a few steps.
        Raises UsageError where data are absent, where the stream has not that scenario, and for a number of steps
        beside `quick`."""
        if self.quick and self.steps:
            raise UsageError("--quick takes six steps an experience: leave --quick out, or --steps.")
        stream = STREAMS[self.stream]
        scenario = self.scenario or stream.scenarios[0]
        stream.check(self.dataset_root, scenario)
        recipe = stream.recipe
        steps = self.steps or recipe.steps
        setting = Setting(
            self.stream, scenario, stream.length(scenario), steps, recipe.batch, recipe.rate,
            fidelity_every=every or max(1, steps // MEASUREMENTS), memory=recipe.memory,
        )  # fmt: skip
        return replace(setting, experiences=2, steps=6, fidelity_every=2, test_limit=100) if self.quick else setting


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
