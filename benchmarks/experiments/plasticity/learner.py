"""One run: the tasks that a change makes of images, a plain loop over tensors in memory, and what is measured at the
beginning and the end of each task."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer
from torch.utils.tensorboard import SummaryWriter

from avalanche_curv import GGN, EmpiricalRisk
from avalanche_curv.core.landscape import GramMatrix, landscape
from avalanche_curv.plasticity.measures import (
    gradient_diversity,
    hidden_activations,
    parameter_norm,
    representation_change,
    representations,
    weight_spectra,
)
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.streams.changes import (
    GrowingClasses,
    LabelFlip,
    PixelPermutation,
    RandomLabels,
    TaskChange,
    TaskVariant,
)
from benchmarks.data import SOURCES, Images, read
from benchmarks.experiments.plasticity.settings import CHANGES, Setting
from benchmarks.harness import Context, Record

if TYPE_CHECKING:
    from benchmarks.experiments.plasticity.experiment import Config

PROBE = 64
ABOVE = (1e-2, 1e-3)  # eigenvalues of the curvature that count
AT_ONCE = 1000
Batch = tuple[Tensor, Tensor]
ACCURACY, TEST_ACCURACY = "plasticity_experience/accuracy", "plasticity_experience/test_accuracy"
MADE: dict[str, TaskChange] = dict(zip(CHANGES, (RandomLabels(), PixelPermutation(), LabelFlip(), GrowingClasses())))


def run(config: Config, seed: int, context: Context) -> Iterator[Record]:
    """Learn one task after another; the number of the task, from 1, is the step of a record. The mean of each metric
    over the last third of its records is one without a step, `late/...`."""
    tasks = Tasks(config.setting, seed, context.dataset_root)
    learner = Learner(config, seed, tasks.of(0)[0])
    measured: dict[str, list[float]] = {}
    with SummaryWriter(str(context.tensorboard_dir)) as writer:
        for number in range(tasks.count):
            train, test = tasks.of(number)
            found = learner.measured_before(number, train)
            learner.learn(number, train)
            found |= learner.measured_after(train, test)
            learner.end_task()
            for name, value in found.items():
                measured.setdefault(name, []).append(value)
                yield {"metric": name, "value": value, "step": number + 1}
                if value == value:
                    writer.add_scalar(name, value, number + 1)
    scalars = summary(measured[ACCURACY]) | {"seconds": learner.seconds}
    scalars |= {f"late/{name}": late_mean(values) for name, values in measured.items()}
    yield from ({"metric": name, "value": value} for name, value in scalars.items())


class Learner:
    """A network with its optimiser and mitigator, all of which outlive the tasks unless the method begins anew."""

    def __init__(self, config: Config, seed: int, first: Task) -> None:
        self.config, self.setting, self.seed = config, config.setting, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.order = torch.Generator().manual_seed(seed)
        self.seconds = 0.0
        self.probe = self._probe(first)[0]  # activations are always those of the same inputs
        self.before: dict[str, Tensor] = {}
        self._begin(0, first)

    def measured_before(self, number: int, task: Task) -> dict[str, float]:
        """At the start of a task: the diversity of its gradients, the spectrum of its curvature, and how activations
        changed since the last began."""
        if number and self.config.method.begins_anew:
            self._begin(number, task)
        now = hidden_activations(self.model, self.probe)
        risk = EmpiricalRisk.snapshot(self.model, nn.CrossEntropyLoss(), [self._probe(task)])
        found = {"plasticity/gradient_effective_rank": gradient_diversity(risk).effective_rank} | curvature(risk)
        if self.before:
            found["plasticity_experience/representation_change"] = representation_change(self.before, now)
        self.before = now
        return found

    def learn(self, number: int, task: Task) -> None:
        """The epochs of a task, each in an order of its own, the same for every method."""
        start = time.perf_counter()
        self.config.method.begin_task(self.mitigator, self.setting, number, self.setting.steps(len(task)))
        for _ in range(self.setting.epochs):
            order = torch.randperm(len(task), generator=self.order)
            fit(self.model, self.optimizer, map(self._on_device, task.batches(order, self.setting.batch)))
        self.seconds += time.perf_counter() - start

    def measured_after(self, train: Task, test: Task | None) -> dict[str, float]:
        """Accuracy on the whole task, and the state of weights and units."""
        found = {ACCURACY: self._accuracy(train)}
        if test is not None:
            found[TEST_ACCURACY] = self._accuracy(test)
        layers = representations(hidden_activations(self.model, self.probe)).values()
        units = sum(layer.units for layer in layers)
        return found | {
            "plasticity/spectral_norm": fmean(s.spectral_norm for s in weight_spectra(self.model).values()),
            "plasticity/parameter_norm": parameter_norm(self.model),
            "plasticity/dormant_units": sum(layer.dormant * layer.units for layer in layers) / units,
            "plasticity/zero_units": sum(layer.zero * layer.units for layer in layers) / units,
        }

    def end_task(self) -> None:
        """After measuring, since some mitigators act at the end of a task for the sake of the next."""
        if self.mitigator is not None:
            self.mitigator.after_task(self.model, self.optimizer)

    def _begin(self, number: int, task: Task) -> None:
        torch.manual_seed(self.seed + 1000 * number)  # every method begins with the same weights
        method, classes = self.config.method, SOURCES[self.setting.images].classes
        network = self.setting.network.build(task.images.shape, classes, method.activation)
        self.model = network.to(self.device)
        self.optimizer = Adam(self.model.parameters(), lr=self.setting.rate)
        self.mitigator: Mitigator | None = method.mitigator(self.setting, self.seed)
        if self.mitigator is not None:
            self.mitigator.attach(self.optimizer, self.model)

    def _probe(self, task: Task) -> Batch:
        return self._on_device(task.batch(torch.arange(min(PROBE, len(task)))))

    def _on_device(self, batch: Batch) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)

    @torch.no_grad()
    def _accuracy(self, task: Task) -> float:
        self.model.eval()
        batches = map(self._on_device, task.batches(torch.arange(len(task)), AT_ONCE))
        return sum(int((self.model(x).argmax(1) == y).sum()) for x, y in batches) / len(task)


def curvature(risk: EmpiricalRisk) -> dict[str, float]:
    """Ranks of the GGN of the mean loss, from all of its eigenvalues: effective rank, how many are above a hundredth of
    the largest, how many above fixed numbers, and the largest. It has as many rows as examples × (classes − 1)."""
    found = landscape(GGN(), risk, k=1, epsilon=1e-2, methods=(GramMatrix(),))
    above = {f"curvature/above_{least:g}": found.density.count_above(least) for least in ABOVE}
    return above | {
        "curvature/effective_rank": found.effective_rank,
        "curvature/numerical_rank": found.numerical_rank,
        "curvature/sharpness": found.sharpness,
    }


def fit(model: nn.Module, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    """One pass over the batches, by cross-entropy."""
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def summary(accuracies: list[float]) -> dict[str, float]:
    """Of the accuracies a_1 ... a_T at the ends of the tasks: a_T, the mean of the last third, and a_1 − that."""
    late = late_mean(accuracies)
    return {"final_accuracy": accuracies[-1], "late_accuracy": late, "drop": accuracies[0] - late}


def late_mean(values: list[float]) -> float:
    """The mean of the last third, rounded down, at least of one."""
    return fmean(values[-max(1, len(values) // 3) :])


@dataclass(frozen=True, eq=False)
class Task:
    """Images as a change shows them; without a copy."""

    images: Images
    variant: TaskVariant

    def __len__(self) -> int:
        return len(self.variant.targets)

    def batch(self, places: Int[Tensor, "n"]) -> tuple[Float[Tensor, "n C H W"], Int[Tensor, "n"]]:
        """The examples at these places, in this order."""
        indices, pixels = self.variant.indices, self.variant.pixels
        inputs = self.images.scaled(places if indices is None else indices[places])
        return (inputs if pixels is None else pixels.of(inputs)), self.variant.targets[places]

    def batches(self, order: Int[Tensor, "n"], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in an order, the last batch smaller where it must."""
        return (self.batch(places) for places in order.split(size))


class Tasks:
    """The training and test examples of each task of a run. Random labels have no test examples."""

    def __init__(self, setting: Setting, seed: int, dataset_root: Path | None) -> None:
        self.train, self.test = read(setting.images, setting.count, setting.validation, dataset_root)
        self.change, self.seed = MADE[setting.change], seed
        self.classes = self.train.targets.unique()
        longest = self.change.longest(self.classes)
        self.count = setting.tasks if longest is None else min(longest, setting.tasks)

    def of(self, number: int) -> tuple[Task, Task | None]:
        """Task `number`: to train and to test on."""
        return self._shown(self.train, number), None if self.change.memorised else self._shown(self.test, number)

    def _shown(self, images: Images, number: int) -> Task:
        return Task(images, self.change.of(images.targets, self.classes, number, self.seed))
