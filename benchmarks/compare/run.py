"""One run of the comparison: a method on a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from avalanche.logging import TensorboardLogger

from avalanche_curv import Fisher, fidelity_metrics
from benchmarks.harness.experiment import Context, Record
from benchmarks.methods import Method
from benchmarks.storage import stored_bytes
from benchmarks.streams import STREAMS
from benchmarks.training import TimedEvaluation, Trainer, learner, logged, summary, test_sets

if TYPE_CHECKING:
    from benchmarks.compare import Setting

CURVES = [
    f"{group}/{picture}/{measure}"
    for group in ("fidelity", "fidelity_trajectory")
    for picture in ("accumulate", "refresh", "accumulate_linear", "refresh_linear")
    for measure in ("kappa", "kappa_abs", "gamma", "alpha", "rho_pooled")
] + ["penalty/raw", "penalty/weighted", "accuracy/stored", "accuracy/current_task", "accuracy/past_tasks"]

MEMORY = 0.1  # of each experience's examples: what fidelity looks at, and what Refresh and Replay store


def run(method: Method, setting: Setting, seed: int, context: Context) -> list[Record]:
    """Train on all experiences; accuracy on each test set after each of them."""
    stream = STREAMS[setting.stream]
    benchmark = stream.make(stream.experiences, seed, context.dataset_root)
    experiences = list(benchmark.train_stream)[: setting.experiences]
    examples = sum(len(experience.dataset) for experience in experiences)
    torch.manual_seed(seed)  # the stream may have drawn: every method starts from the same weights
    strategy, evaluation = build(method, setting, benchmark, examples, context)
    trainer, tests = Trainer(strategy, evaluation), test_sets(benchmark, setting.test_limit)[: setting.experiences]
    records = [record for found in trainer.course(experiences, tests) for record in found]
    scalars = summary(trainer.rows) | {"seconds": trainer.seconds, "stored_bytes": float(stored_bytes(strategy))}
    scalars["metric_seconds"] = evaluation.seconds
    scalars["weights"] = float(sum(p.double().sum() for p in strategy.model.parameters()))  # tells equal runs
    records += [{"metric": name, "value": value} for name, value in scalars.items()]
    return records + logged(evaluation, CURVES)


def build(method: Method, setting: Setting, benchmark: Any, examples: int, context: Context) -> tuple[Any, Any]:
    """The strategy of a method and its evaluation, with metrics that draw nothing and TensorBoard files."""
    model = STREAMS[setting.stream].model()
    evaluation = TimedEvaluation(
        *fidelity_metrics(curvature=Fisher(), every=setting.every, fraction=MEMORY, stream=benchmark.test_stream),
        loggers=[TensorboardLogger(context.tensorboard_dir)],
    )
    strategy = learner(model, setting, method.plugins(examples), evaluation, kind=method.strategy)
    return strategy, evaluation
