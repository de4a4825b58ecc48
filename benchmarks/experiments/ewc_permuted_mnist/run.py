"""One run: a method on ten permutations, in one setting."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from pathlib import Path

import torch
from torch import Tensor, nn

from avalanche_curv.core import NonFiniteCurvatureError
from benchmarks.experiments.ewc_permuted_mnist import Config, Setting
from benchmarks.experiments.plasticity.data import Images, read
from benchmarks.experiments.projections.data import Stream, WholeBatches, permuted
from benchmarks.experiments.projections.methods import Multitask
from benchmarks.harness.experiment import Context, Record
from benchmarks.mnist import CLASSES
from benchmarks.training import Data, Steps, TimedEvaluation, Trainer, mean, summary

EXAMPLES = 60_000  # all training images


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one task after another; the number of tasks learned is the step of a record. Weights that diverge end the
    run, without an accuracy."""
    setting, joint = config.setting, isinstance(config.method, Multitask)
    found = stream(setting, seed, context.dataset_root, at_once=joint)
    torch.manual_seed(seed)  # every row of one size starts from the same weights
    trainer = build(config, found, setting.steps * (setting.tasks if joint else 1))
    rows: list[list[float]] = []
    for experience in found.benchmark.train_stream:
        try:
            trainer.train(experience)
        except NonFiniteCurvatureError:
            yield {"metric": "average_accuracy", "value": nan}
            return
        learned = setting.tasks if joint else len(rows) + 1
        rows.append(trainer.accuracies(test.all() for test in found.tests[:learned]))
        yield {"metric": "accuracy/seen", "value": mean(rows[-1]), "step": learned}
        yield from (
            {"metric": f"accuracy/experience_{task}", "value": value, "step": learned}
            for task, value in enumerate(rows[-1])
        )
    scalars = {"average_accuracy": mean(rows[-1])} if joint else summary(rows)
    yield from ({"metric": name, "value": value} for name, value in {**scalars, "seconds": trainer.seconds}.items())


def stream(setting: Setting, seed: int, dataset_root: Path | None, *, at_once: bool) -> Stream:
    """Permutations of MNIST, or of what is left of its training images and what is held out of them."""
    train, test = (_scaled(part, setting) for part in read(setting.images, EXAMPLES, 0, dataset_root))
    if setting.validation:
        train, test = held_out(train, setting.validation, seed)
    return permuted(train, test, setting.tasks, seed, at_once=at_once)


def held_out(train: Data, part: float, seed: int) -> tuple[Data, Data]:
    """Training images without a random part of them, and that part."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    kept, held = order.tensor_split([len(order) - round(part * len(order))])
    return (train[0][kept], train[1][kept]), (train[0][held], train[1][held])


def _scaled(images: Images, setting: Setting) -> tuple[Tensor, Tensor]:
    pixels = images.scaled(torch.arange(len(images.targets))).flatten(1)
    return pixels.sub_(setting.mean).div_(setting.deviation), images.targets


def build(config: Config, found: Stream, steps: int) -> Trainer:
    """So many steps in each experience, and nothing measured while it trains."""
    setting, evaluation = config.setting, TimedEvaluation(loggers=[])
    model = network(found.parts[0].pixels.shape[1], setting.hidden)
    strategy = config.method.strategy(
        model=model,
        optimizer=setting.optimiser.of(model),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=setting.batch,
        train_epochs=steps,  # at least one step each: `Steps` ends the experience
        plugins=[WholeBatches(found.parts), *config.method.plugins(sum(map(len, found.parts))), Steps(steps)],
        evaluator=evaluation,
    )
    strategy.plugins.remove(evaluation)  # without metrics it would still be asked 24 times a step
    return Trainer(strategy, evaluation)


def network(inputs: int, hidden: int) -> nn.Sequential:
    """Two hidden layers, drawn from torch's current random state."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    )
