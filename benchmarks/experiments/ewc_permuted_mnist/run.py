"""One run: a method on ten permutations, in one setting."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from avalanche_curv.core import NonFiniteCurvatureError
from benchmarks.data import ALL, CLASSES, read
from benchmarks.harness.experiment import Context, Record
from benchmarks.networks import mlp
from benchmarks.streams.whole_batches import TensorStream, accuracy_records, permuted, plain_trainer
from benchmarks.training import Data, Trainer, mean, summary

if TYPE_CHECKING:
    from benchmarks.experiments.ewc_permuted_mnist.experiment import Config, Setting


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one task after another; the number of tasks learned is the step of a record. Weights that diverge end the
    run, without an accuracy."""
    setting, joint = config.setting, config.method.joint
    found = stream(setting, seed, context.dataset_root, at_once=joint)
    torch.manual_seed(seed)  # every row of one size starts from the same weights
    trainer = build(config, found)
    rows: list[list[float]] = []
    for experience in found.benchmark.train_stream:
        try:
            trainer.train(experience)
        except NonFiniteCurvatureError:
            yield {"metric": "average_accuracy", "value": nan}
            return
        learned = setting.tasks if joint else len(rows) + 1
        rows.append(trainer.accuracies(test.all() for test in found.tests[:learned]))
        yield from accuracy_records(rows[-1], learned)
    scalars = {"average_accuracy": mean(rows[-1])} if joint else summary(rows)
    yield from ({"metric": name, "value": value} for name, value in {**scalars, "seconds": trainer.seconds}.items())


def stream(setting: Setting, seed: int, dataset_root: Path | None, *, at_once: bool) -> TensorStream:
    """Permutations of MNIST, or of what is left of its training images and what is held out of them."""
    train, test = (
        (part.vectors(setting.mean, setting.deviation), part.targets)
        for part in read(setting.images, ALL, 0, dataset_root)
    )
    if setting.validation:
        train, test = held_out(train, setting.validation, seed)
    return permuted(train, test, setting.tasks, seed, at_once=at_once)


def held_out(train: Data, part: float, seed: int) -> tuple[Data, Data]:
    """Training images without a random part of them, and that part."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    kept, held = order.tensor_split([len(order) - round(part * len(order))])
    return (train[0][kept], train[1][kept]), (train[0][held], train[1][held])


def build(config: Config, found: TensorStream) -> Trainer:
    """So many steps for each task; nothing is measured while it trains."""
    setting, method = config.setting, config.method
    model = mlp(found.parts[0].inputs.shape[1], setting.hidden, setting.hidden, CLASSES)
    return plain_trainer(
        found, model, setting.optimiser.of(model), method.plugins(sum(map(len, found.parts))), batch=setting.batch,
        steps=setting.steps * (setting.tasks if method.joint else 1), kind=method.strategy,
    )
