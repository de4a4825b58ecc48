"""One run: a method on ten permutations, and what it protects after each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import OrthogonalProjectionPlugin
from benchmarks.data import CLASSES, DEVIATION, MEAN, read
from benchmarks.harness.experiment import Context, Record
from benchmarks.networks import mlp
from benchmarks.streams.whole_batches import TensorStream, permuted, plain_trainer
from benchmarks.training import Trainer, mean, summary

if TYPE_CHECKING:
    from benchmarks.experiments.projections.experiment import Config, Setting


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one task after another; the number of tasks learned is the step of a record."""
    setting, joint = config.setting, config.method.joint
    found = stream(setting, seed, context.dataset_root, at_once=joint)
    torch.manual_seed(seed)  # every method starts from the same weights and sees the same batches
    trainer, guard = build(config, found)
    rows: list[list[float]] = []
    for experience in found.benchmark.train_stream:
        guard.remember()
        trainer.train(experience)
        rows.append(trainer.accuracies(test.all() for test in found.tests))
        learned = setting.tasks if joint else len(rows)
        scalars = {"accuracy_seen": mean(rows[-1][:learned])} | guard.scalars()
        yield from ({"metric": name, "value": value, "step": learned} for name, value in scalars.items())
        for task, value in enumerate(rows[-1]):
            yield {"metric": "accuracy", "value": value, "step": learned, "task": task}
    yield from _at_the_end(rows, trainer)


def stream(setting: Setting, seed: int, dataset_root: Path | None, *, at_once: bool) -> TensorStream:
    """Permutations of the images, normalised as Avalanche normalises MNIST."""
    images = read(setting.images, setting.examples, 0, dataset_root)
    train, test = ((part.vectors(MEAN, DEVIATION), part.targets) for part in images)
    return permuted(train, test, setting.tasks, seed, at_once=at_once)


def build(config: Config, found: TensorStream) -> tuple[Trainer, Guard]:
    """Plain SGD and nothing measured while it trains."""
    setting, plugins = config.setting, config.method.plugins(sum(map(len, found.parts)))
    model = network(found.parts[0].inputs.shape[1], setting)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=setting.momentum)
    trainer = plain_trainer(
        found, model, optimizer, plugins, batch=setting.batch, epochs=setting.epochs, kind=config.method.strategy
    )
    return trainer, Guard(plugins, model)


def network(inputs: int, setting: Setting) -> nn.Sequential:
    """Two hidden layers without biases, drawn from torch's current random state."""
    return mlp(inputs, setting.hidden, setting.hidden, CLASSES, bias=False)


class Guard:
    """What a method protects, if it does: the space before a task, and the parameters in it then."""

    def __init__(self, plugins: list[SupervisedPlugin], model: nn.Module) -> None:
        self.plugin = next((p for p in plugins if isinstance(p, OrthogonalProjectionPlugin)), None)
        self.model = model
        self.remember()

    def remember(self) -> None:
        """Before a task."""
        if self.plugin is not None:
            self.space = self.plugin.protected
            self.start = {name: value.clone() for name, value in self.space.values(self.model).items()}

    def scalars(self) -> dict[str, float]:
        """After a task: the part of the dimensions that is protected, bytes of bases, energy kept, and how much of what
        the task changed lay in what was protected before it."""
        if self.plugin is None:
            return {}
        space = self.plugin.protected
        total = sum(p.numel() for p in self.model.parameters())
        found = {"used": space.used / total, "basis_bytes": float(space.nbytes), "energy": space.energy}
        if not self.space.is_empty:
            found["leakage"] = self.space.leakage(self.space.values(self.model), self.start)
        return found


def _at_the_end(rows: list[list[float]], trainer: Trainer) -> Iterator[Record]:
    scalars = {"average_accuracy": mean(rows[-1]), "seconds": trainer.seconds}
    if len(rows) > 1:
        of_tasks = summary(rows)
        scalars |= {"learned": of_tasks["learned"], "backward_transfer": -of_tasks["forgetting"]}
    yield from ({"metric": name, "value": value} for name, value in scalars.items())
    for task, value in enumerate(rows[-1], start=1):
        yield {"metric": "final_accuracy", "value": value, "step": task}
