"""One run: online EWC with one estimator of the Fisher at one strength."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avalanche_curv import CurvatureEWCPlugin, Fisher
from avalanche_curv.core import Curvature, EmpiricalRisk, Merge, Past, Policy, Structure
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.streams._benchmark import benchmark
from benchmarks.data import ALL, CLASSES, DEVIATION, MEAN, Images, read
from benchmarks.harness.experiment import Context, Record
from benchmarks.networks import many_heads, mlp
from benchmarks.streams.whole_batches import Examples, TensorStream, accuracy_records, plain_trainer
from benchmarks.training import Trainer, summary

if TYPE_CHECKING:
    from benchmarks.experiments.fisher_estimators.experiment import Config, Setting


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one pair after another; the number of tasks learned is the step of a record."""
    found = stream(config.setting, seed, context.dataset_root)
    torch.manual_seed(seed)  # every estimator starts from the same weights and sees the same batches
    watched = Watched(config.estimator.examples if config.estimator else None, seed)
    trainer = build(config, found, watched)
    rows: list[list[float]] = []
    for learned, experience in enumerate(found.benchmark.train_stream, start=1):
        trainer.train(experience)
        rows.append(accuracies(trainer, found, learned))
        yield from accuracy_records(rows[-1], learned)
    scalars = summary(rows) | {"seconds": trainer.seconds} | watched.scalars()
    yield from ({"metric": name, "value": value} for name, value in scalars.items())


def stream(setting: Setting, seed: int, dataset_root: Path | None) -> TensorStream:
    """Every training and test image of two digits in each task, as its classes 0 and 1, the digits in an order drawn by
    `seed`; normalised as Avalanche normalises MNIST."""
    order = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    digits = order.split(2)[: setting.tasks]
    parts, tests = (
        tuple(_pair(images, pair, task) for task, pair in enumerate(digits))
        for images in read(setting.images, ALL, 0, dataset_root)
    )
    return TensorStream(benchmark(list(zip(parts, tests)), list(range(setting.tasks)), 2), parts, tests)


def _pair(images: Images, digits: Tensor, task: int) -> Examples:
    chosen = torch.isin(images.targets, digits).nonzero().squeeze(1)
    pixels = images.scaled(chosen).flatten(1).sub_(MEAN).div_(DEVIATION)
    return Examples(pixels, (images.targets[chosen] == digits[1]).long(), task=task)


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


def build(config: Config, found: TensorStream, policy: Watched) -> Trainer:
    """Adam, on a network with two hidden layers and a head of two outputs for each task."""
    setting = config.setting
    body = mlp(found.parts[0].inputs.shape[1], setting.hidden, setting.hidden).append(torch.nn.ReLU())
    model = many_heads(body, setting.hidden, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate, fused=True)
    return plain_trainer(found, model, optimizer, penalties(config, policy), batch=setting.batch, steps=setting.steps)


def penalties(config: Config, policy: Watched) -> list[CurvatureEWCPlugin]:
    """None for Naive."""
    if config.estimator is None or config.strength is None:
        return []
    curvature = drawn_by(config.estimator.curvature, policy.seed)
    return [CurvatureEWCPlugin(config.strength, curvature=curvature, policy=policy)]


def drawn_by(curvature: Curvature, seed: int) -> Curvature:
    """The estimator, whose sampled labels, if any, are drawn by the seed of the run."""
    return replace(curvature, seed=seed) if isinstance(curvature, Fisher) and curvature.samples else curvature


def accuracies(trainer: Trainer, found: TensorStream, learned: int) -> list[float]:
    """On the test images of each task learned so far, by the head of the task."""
    model = trainer.strategy.model.eval()
    with torch.no_grad():
        return [
            (model(test.inputs, test.task).argmax(1) == test.targets).float().mean().item()
            for test in found.tests[:learned]
        ]
