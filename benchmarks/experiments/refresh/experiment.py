"""How wrong a quadratic model of past loss becomes, kept at its anchor or refreshed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import (
    Accumulate,
    CurvatureEWCPlugin,
    Dense,
    Fisher,
    Policy,
    Refresh,
    SineBoundary,
    fidelity_metrics,
)
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.training import CosinePerExperience, TimedEvaluation, learner

Curve = dict[int, float]


@dataclass(frozen=True)
class Config:
    """One policy on the sine stream, with the log's model and training."""

    label: str
    policy: Policy | None
    strength: float
    experiences: int = 9
    steps: int = 100
    batch: int = 32
    rate: float = 1e-2
    weight_decay: float = 1e-3
    memory: float = 0.1
    every: int = 1

    @property
    def cost(self) -> float:
        return 1.0 if self.policy is None else 2.0


STRENGTHS = {"accumulate": 0.1, "refresh": 1.0, "refresh with gradient": 1.0}  # `run tune --target refresh --seeds 2`


class RefreshExperiment(Experiment):
    """Both quadratic models along each trajectory at every step; the table has that which the policy trains with."""

    name = "refresh"

    def configs(self, options: Options) -> Sequence[Config]:
        policies = {
            "sequential": None,
            "accumulate": Accumulate(fraction=0.1),
            "refresh": Refresh(fraction=0.1),
            "refresh with gradient": Refresh(fraction=0.1, gradient=True),
        }
        size = {"experiences": 3, "steps": 10} if options.quick else {}
        return [Config(name, policy, STRENGTHS.get(name, 0.0), **size) for name, policy in policies.items()]

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Train on all tasks; accuracy and both models at every step from the second task on."""
        benchmark = SineBoundary(config.experiences, seed=seed)
        torch.manual_seed(seed)
        strategy, evaluation = build(config, seed, benchmark, context)
        strategy.train(benchmark.train_stream, eval_streams=[])
        curves = {name: dict(zip(*points)) for name, points in evaluation.get_all_metrics().items()}
        seen = accuracy_on_seen(curves, config.steps)
        records: list[Record] = [{"metric": "acc", "value": value, "step": step} for step, value in seen.items()]
        own = "refresh" if isinstance(config.policy, Refresh) else "accumulate"
        for model in ("accumulate", "refresh"):
            measured = {"all_accuracy": seen, "stored_accuracy": curves["accuracy/stored"]}
            measured |= model_curves(curves, model)
            for name, curve in measured.items():
                past = {step: value for step, value in curve.items() if step >= config.steps}
                final, average = past[max(past)], sum(past.values()) / len(past)
                records += [
                    {"metric": f"final/{model}/{name}", "value": final},
                    {"metric": f"trajectory/{model}/{name}", "value": average},
                ]
            if model == own:
                points = model_curves(curves, model)["kappa_abs"].items()
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


def model_curves(curves: dict[str, Curve], model: str) -> dict[str, Curve]:
    """The measures of one model, with and without linear term."""
    names: Sequence[str] = ("kappa", "kappa_abs", "gamma", "alpha")
    plain = {name: curves[f"fidelity/{model}/{name}"] for name in names}
    return plain | {f"{name}_linear": curves[f"fidelity/{model}_linear/{name}"] for name in names}


experiment = RefreshExperiment()
