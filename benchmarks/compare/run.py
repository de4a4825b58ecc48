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
from benchmarks.training import TimedEvaluation, Trainer, learner, logged, test_sets

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
    rows: list[list[float]] = []
    records: list[Record] = []
    for number, experience in enumerate(experiences):
        trainer.train(experience)
        rows.append(trainer.accuracies(tests))
        step = strategy.clock.train_iterations
        records += [
            {"metric": f"accuracy/experience_{k}", "value": value, "step": step} for k, value in enumerate(rows[-1])
        ]
        records.append({"metric": "accuracy/seen", "value": mean(rows[-1][: number + 1]), "step": step})
    scalars = summary(rows) | {"seconds": trainer.seconds, "stored_bytes": float(stored_bytes(strategy))}
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


def summary(rows: list[list[float]]) -> dict[str, float]:
    """Average accuracy A = mean_j a_{T,j} and forgetting F = mean_{j<T} (a_{j,j} − a_{T,j}) of the accuracy a_{t,j}
    on task j after experience t (Chaudhry et al. 2018, with the accuracy just after learning as the reference)."""
    last = rows[-1]
    drops = [rows[j][j] - last[j] for j in range(len(rows) - 1)]
    return {"average_accuracy": mean(last), "forgetting": mean(drops) if drops else 0.0}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
