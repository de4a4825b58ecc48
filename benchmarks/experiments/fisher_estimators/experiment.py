"""Five methods to compute the Fisher information, each across strengths that differ by orders of magnitude.

The comparison of van de Ven, "On the computation of the Fisher information in continual learning" (2025), on split
MNIST with task labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from avalanche_curv import BatchedEmpiricalFisher, CurvatureEWCPlugin, EmpiricalFisher, Fisher
from avalanche_curv.core import Curvature, EmpiricalRisk, Merge, Past, Policy, Structure
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.streams._benchmark import benchmark
from benchmarks.data import ALL, CLASSES, DEVIATION, MEAN, Images, check, read
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.networks import many_heads, mlp
from benchmarks.streams.whole_batches import Examples, TensorStream, accuracy_records, plain_trainer
from benchmarks.training import Trainer, accuracies, summary

EXACT, NAIVE = "exact", "Naive"
COMMON = 1e4  # a strength at which every estimator is tried
EXPONENTS = {  # of ten: where accuracy rises, decade by decade, its plateau, and `COMMON`
    EXACT: (2, 3, 4, 5, 6),
    "exact, 500 examples": (2, 3, 4, 5),
    "one sampled label": (4, 5, 6, 7, 9),
    "empirical": (4, 5, 6, 7, 9),
    "batches of 128": (4, 6, 7, 8, 10),
}


@dataclass(frozen=True)
class Setting:
    """What all estimators share: two digits a task, told apart by a head of their own, `steps` steps of Adam at `rate`
    a task, on a ReLU network with two hidden layers of `hidden`."""

    images: str = "mnist"
    tasks: int = 5
    hidden: int = 400
    steps: int = 2000
    batch: int = 128
    rate: float = 1e-3


@dataclass(frozen=True)
class Estimator:
    """A kind of curvature, of so many random `examples` of each task; None for all."""

    curvature: Curvature
    examples: int | None = None

    def seeded(self, seed: int) -> Curvature:
        """The curvature, whose sampled labels, if any, are drawn by the seed of the run."""
        kind = self.curvature
        return replace(kind, seed=seed) if isinstance(kind, Fisher) and kind.samples else kind


ESTIMATORS = {
    EXACT: Estimator(Fisher()),
    "exact, 500 examples": Estimator(Fisher(), examples=500),
    "one sampled label": Estimator(Fisher(samples=1, seed=0)),
    "empirical": Estimator(EmpiricalFisher()),
    "batches of 128": Estimator(BatchedEmpiricalFisher(batch_size=128)),
}


@dataclass(frozen=True)
class Config:
    """One estimator at a strength; Naive has neither."""

    label: str
    name: str
    setting: Setting
    estimator: Estimator | None = None
    strength: float | None = None


class FisherEstimators(Experiment):
    """Average accuracy of online EWC for each estimator at each strength."""

    name = "fisher_estimators"

    def configs(self, options: Options) -> Sequence[Config]:
        """Naive, and each estimator at every strength of its range; with `quick` at two of them, a few steps on two
        pairs of digits that need no download. Raises UsageError where MNIST is absent."""
        setting = Setting("digits", tasks=2, hidden=20, steps=30) if options.quick else Setting()
        check(setting.images, options.dataset_root)
        return [Config(NAIVE, NAIVE, setting)] + [
            Config(f"{name}, 1e{exponent}", name, setting, estimator, 10.0**exponent)
            for name, estimator in ESTIMATORS.items()
            for exponent in EXPONENTS[name][-2 if options.quick else 0 :]
        ]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        """Learn one pair after another; the number of tasks learned is the step of a record."""
        found = stream(config.setting, seed, context.dataset_root)
        torch.manual_seed(seed)  # every estimator starts from the same weights and sees the same batches
        watched = Watched(config.estimator.examples if config.estimator else None, seed)
        trainer = build(config, found, watched)
        rows: list[list[float]] = []
        for learned, experience in enumerate(found.benchmark.train_stream, start=1):
            trainer.train(experience)
            tests = [(test.inputs, test.targets) for test in found.tests[:learned]]
            rows.append(accuracies(trainer.strategy.model, tests, range(learned)))
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
    """Adam, on a network with two hidden layers and a head of two outputs for each task; Naive has no penalty."""
    setting, plugins = config.setting, []
    body = mlp(found.parts[0].inputs.shape[1], setting.hidden, setting.hidden).append(torch.nn.ReLU())
    model = many_heads(body, setting.hidden, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate, fused=True)
    if config.estimator is not None and config.strength is not None:
        curvature = config.estimator.seeded(policy.seed)
        plugins.append(CurvatureEWCPlugin(config.strength, curvature=curvature, policy=policy))
    return plain_trainer(found, model, optimizer, plugins, batch=setting.batch, steps=setting.steps)


experiment = FisherEstimators()
