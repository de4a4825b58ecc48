"""One run: a method on ten permutations, and what it protects after each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import OrthogonalProjectionPlugin
from benchmarks.experiments.projections import Config, Setting
from benchmarks.experiments.projections.data import Stream, WholeBatches, stream
from benchmarks.experiments.projections.methods import Multitask
from benchmarks.harness.experiment import Context, Record
from benchmarks.mnist import CLASSES
from benchmarks.training import TimedEvaluation, Trainer, mean, summary


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one task after another; the number of tasks learned is the step of a record."""
    setting = config.setting
    found = stream(setting, seed, context.dataset_root, at_once=isinstance(config.method, Multitask))
    torch.manual_seed(seed)  # every method starts from the same weights and sees the same batches
    trainer, guard = build(config, found)
    rows: list[list[float]] = []
    for experience in found.benchmark.train_stream:
        guard.remember()
        trainer.train(experience)
        rows.append(trainer.accuracies(test.all() for test in found.tests))
        learned = setting.tasks if isinstance(config.method, Multitask) else len(rows)
        scalars = {"accuracy_seen": mean(rows[-1][:learned])} | guard.scalars()
        yield from ({"metric": name, "value": value, "step": learned} for name, value in scalars.items())
        for task, value in enumerate(rows[-1]):
            yield {"metric": "accuracy", "value": value, "step": learned, "task": task}
    yield from _at_the_end(rows, trainer)


def build(config: Config, found: Stream) -> tuple[Trainer, Guard]:
    """Plain SGD and nothing measured while it trains."""
    setting, evaluation = config.setting, TimedEvaluation(loggers=[])
    model = network(found.parts[0].pixels.shape[1], setting)
    plugins = config.method.plugins(sum(map(len, found.parts)))
    strategy = config.method.strategy(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=setting.rate, momentum=setting.momentum),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=setting.batch,
        train_epochs=setting.epochs,
        plugins=[WholeBatches(found.parts), *plugins],
        evaluator=evaluation,
    )
    strategy.plugins.remove(evaluation)  # without metrics it would still be asked 24 times a step, a tenth of its time
    return Trainer(strategy, evaluation), Guard(plugins, model)


def network(inputs: int, setting: Setting) -> nn.Sequential:
    """Two hidden layers without biases, drawn from torch's current random state."""
    h = setting.hidden
    sizes = ((inputs, h), (h, h), (h, CLASSES))
    first, second, last = (nn.Linear(i, o, bias=False) for i, o in sizes)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


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
