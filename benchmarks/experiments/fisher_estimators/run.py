"""One run: online EWC with one estimator of the Fisher at one strength."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training import Naive
from jaxtyping import Float, Int
from torch import Tensor, nn

from avalanche_curv import CurvatureEWCPlugin, Fisher
from avalanche_curv.core import Curvature, EmpiricalRisk, Merge, Past, Policy, Structure
from avalanche_curv.core.risk.batches import random_part
from benchmarks.experiments.fisher_estimators import Config
from benchmarks.experiments.fisher_estimators.data import Stream, stream
from benchmarks.experiments.projections.data import WholeBatches
from benchmarks.harness.experiment import Context, Record
from benchmarks.training import Steps, TimedEvaluation, Trainer, mean, summary


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one pair after another; the number of tasks learned is the step of a record."""
    found = stream(config.setting, seed, context.dataset_root)
    torch.manual_seed(seed)  # every estimator starts from the same weights and sees the same batches
    watched = Watched(config.estimator.examples if config.estimator else None, seed)
    trainer = build(config, found, watched)
    rows: list[list[float]] = []
    for learned, experience in enumerate(found.benchmark.train_stream, start=1):
        trainer.train(experience)
        rows.append(accuracies(trainer.strategy.model, found, learned))
        yield {"metric": "accuracy/seen", "value": mean(rows[-1]), "step": learned}
        yield from (
            {"metric": f"accuracy/experience_{task}", "value": value, "step": learned}
            for task, value in enumerate(rows[-1])
        )
    scalars = summary(rows) | {"seconds": trainer.seconds} | watched.scalars()
    yield from ({"metric": name, "value": value} for name, value in scalars.items())


class Watched(Policy):
    """Online EWC with γ = 1, the newest anchor and the sum of all Fishers, each of so many random examples; and what
    the first of them is."""

    def __init__(self, examples: int | None, seed: int) -> None:
        self.examples, self.seed = examples, seed
        self.traces: list[float] = []
        self.seconds: list[float] = []

    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        start = time.perf_counter()
        if self.examples is not None and self.examples < risk.examples:
            fraction = self.examples / risk.examples
            risk = risk.select(random_part(risk.examples, fraction, self.seed * 1_000_003 + past.experiences))
        found = Merge().absorb(past, risk, curvature, structure)
        self.seconds.append(time.perf_counter() - start)
        if found.model is not None:
            self.traces.append(found.model.curvature.trace())
        return found

    def scalars(self) -> dict[str, float]:
        """The trace of the first Fisher, and the seconds it took."""
        return {"trace": self.traces[0], "estimate_seconds": self.seconds[0]} if self.traces else {}


def build(config: Config, found: Stream, policy: Watched) -> Trainer:
    """Adam, and nothing measured while it trains."""
    setting, evaluation = config.setting, TimedEvaluation(loggers=[])
    model = Network(found.parts[0].inputs.shape[1], setting.hidden)
    parts: Any = found.parts
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=setting.rate, fused=True),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=setting.batch,
        train_epochs=setting.steps,  # at least one step each: `Steps` ends the experience
        plugins=[WholeBatches(parts), *penalties(config, policy), Steps(setting.steps)],
        evaluator=evaluation,
    )
    strategy.plugins.remove(evaluation)  # without metrics it would still be asked 24 times a step
    return Trainer(strategy, evaluation)


def penalties(config: Config, policy: Watched) -> list[CurvatureEWCPlugin]:
    """None for Naive."""
    if config.estimator is None or config.strength is None:
        return []
    curvature = drawn_by(config.estimator.curvature, policy.seed)
    return [CurvatureEWCPlugin(config.strength, curvature=curvature, policy=policy)]


def drawn_by(curvature: Curvature, seed: int) -> Curvature:
    """The same estimator; its sampled labels, if any, are drawn by the seed of the run."""
    return replace(curvature, seed=seed) if isinstance(curvature, Fisher) and curvature.samples else curvature


class Network(MultiTaskModule):
    """Two hidden layers, drawn from torch's current random state, and a head of two outputs for each task."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.heads = MultiHeadClassifier(hidden, 2, masking=False)

    def forward(self, x: Float[Tensor, "N d"], task_labels: Int[Tensor, "N"] | int) -> Float[Tensor, "N 2"]:
        return self.heads(self.trunk(x), task_labels)


def accuracies(model: nn.Module, found: Stream, learned: int) -> list[float]:
    """On the test images of each task learned so far, by the head of the task."""
    model.eval()
    with torch.no_grad():
        return [
            (model(test.inputs, test.task).argmax(1) == test.targets).float().mean().item()
            for test in found.tests[:learned]
        ]
