"""One run of the refresh experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import CurvatureEWCPlugin, Dense, Fisher, SineBoundary, fidelity_metrics
from benchmarks.harness.experiment import Context, Record
from benchmarks.training import CosinePerExperience, TimedEvaluation, learner

if TYPE_CHECKING:
    from benchmarks.experiments.refresh import Config

Curve = dict[int, float]


def run(config: Config, seed: int, context: Context) -> list[Record]:
    """Train on all tasks; accuracy and both pictures at every step from the second task on."""
    benchmark = SineBoundary(config.experiences, seed=seed)
    torch.manual_seed(seed)
    strategy, evaluation = build(config, seed, benchmark, context)
    strategy.train(benchmark.train_stream, eval_streams=[])
    curves = {name: dict(zip(*points)) for name, points in evaluation.get_all_metrics().items()}
    seen = accuracy_on_seen(curves, config.steps)
    records: list[Record] = [{"metric": "acc", "value": value, "step": step} for step, value in seen.items()]
    own = "refresh" if config.label.startswith("refresh") else "accumulate"
    for picture in ("accumulate", "refresh"):
        measured = {"all_accuracy": seen, "stored_accuracy": curves["accuracy/stored"], **pictured(curves, picture)}
        for name, curve in measured.items():
            past = {step: value for step, value in curve.items() if step >= config.steps}
            final, average = past[max(past)], sum(past.values()) / len(past)
            records += [
                {"metric": f"final/{picture}/{name}", "value": final},
                {"metric": f"trajectory/{picture}/{name}", "value": average},
            ]
        if picture == own:
            points = pictured(curves, picture)["kappa_abs"].items()
            records += [{"metric": "kappa_abs", "value": value, "step": step} for step, value in points]
    return records


def build(config: Config, seed: int, benchmark: Any, context: Context) -> tuple[Any, Any]:
    """The log's model and training, with everything measured at every step (or every n)."""
    model = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 2))
    plugins: list[Any] = [CosinePerExperience(config.steps)]
    if config.policy is not None:
        plugins.insert(
            0, CurvatureEWCPlugin(config.strength, curvature=Fisher(), structure=Dense(), policy=config.policy)
        )
    evaluation = TimedEvaluation(
        *fidelity_metrics(curvature=Fisher(), fraction=config.memory, every=config.every, stream=benchmark.test_stream),
        loggers=[TensorboardLogger(context.tensorboard_dir)],
    )
    strategy = learner(model, config, plugins, evaluation, weight_decay=config.weight_decay)
    return strategy, evaluation


def accuracy_on_seen(curves: dict[str, Curve], steps: int) -> Curve:
    """The mean test accuracy over all tasks seen so far, the current one included, at each step."""
    current, past = curves["accuracy/current_task"], curves["accuracy/past_tasks"]
    return {
        step: (value + (step // steps) * past[step]) / (step // steps + 1) if step in past else value
        for step, value in current.items()
    }


def pictured(curves: dict[str, Curve], picture: str) -> dict[str, Curve]:
    """The measures of one picture, with and without linear term."""
    names: Sequence[str] = ("kappa", "kappa_abs", "gamma", "alpha")
    plain = {name: curves[f"fidelity/{picture}/{name}"] for name in names}
    return plain | {f"{name}_linear": curves[f"fidelity/{picture}_linear/{name}"] for name in names}
