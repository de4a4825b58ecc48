"""Gradient projection memory and its family on ten permuted MNIST tasks, beside EWC and the multitask bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import (
    Accumulate,
    Diagonal,
    Eigenspace,
    Energy,
    Fisher,
    GradientProjection,
    InputSpace,
    OrthogonalProjectionPlugin,
    OutputGradient,
    PerLayer,
    Projection,
    Rank,
    StepProjection,
)
from benchmarks.data import CLASSES, DEVIATION, MEAN, PIXELS, check, read
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.harness.errors import selected
from benchmarks.harness.options import one_of, positive
from benchmarks.harness.tuning import FIRST_SEED
from benchmarks.methods import AvalancheEWC, Method, Multitask, Ours, Plain, Projected, Rehearsal
from benchmarks.networks import mlp
from benchmarks.streams.whole_batches import TensorStream, permuted, plain_trainer
from benchmarks.training import Trainer, mean, summary

MAIN, WIDE, TUNE = PARTS = ("main", "wide", "tune")
GPM, OGD, EWC, CURVATURE_EWC, MULTITASK = "GPM", "OGD", "Avalanche's EWC", "CurvatureEWC", "multitask"
REPLAYED = 1000  # examples in the memory of replay
MOMENTUM = 0.9
RANK = {MAIN: 20, WIDE: 100, TUNE: 20}
STRENGTHS = {EWC: 30.0, CURVATURE_EWC: 3.0}  # `run projections --part tune --tasks 5 --epochs 1`
GRIDS = {EWC: (10.0, 30.0, 100.0, 300.0, 1000.0), CURVATURE_EWC: (1.0, 3.0, 10.0, 30.0, 100.0)}


@dataclass(frozen=True)
class Setting:
    """What all methods share: `tasks` permutations of the first `size` training images, `epochs` of each in batches
    of `batch`, by SGD at `rate`, on a network with two hidden layers of `hidden` without biases."""

    images: str = "mnist"
    tasks: int = 10
    size: int = 60_000
    epochs: int = 5
    batch: int = 10
    rate: float = 0.01
    momentum: float = 0.0
    hidden: int = 100

    @property
    def steps(self) -> int:
        """Those of all tasks."""
        return self.tasks * self.epochs * -(-self.size // self.batch)


@dataclass(frozen=True)
class Config:
    """One method of a family; `first_seed` sets tuning apart from what is reported, and `milliseconds` are about those
    of a step, by which the costly rows start first."""

    label: str
    family: str
    method: Method
    setting: Setting
    milliseconds: float = 0.7
    first_seed: int = 0

    @property
    def cost(self) -> float:
        return self.milliseconds * self.setting.steps


def rows(setting: Setting, part: str, rank: int | None) -> list[Config]:
    """The grid of a part."""
    if part == TUNE:
        return [
            Config(f"{name} at {strength:g}", name, penalised(name, strength), setting, first_seed=FIRST_SEED)
            for name, grid in GRIDS.items()
            for strength in grid
        ]
    k = RANK[part] if rank is None else rank
    read = 0.7 + 0.03 * k * (setting.tasks - 1) / 2  # milliseconds: a flat basis is read twice in a step
    flat = Eigenspace(Fisher(), Rank(k))
    found = [
        Config("Naive", "Naive", Plain(), setting),
        Config("GPM", GPM, gpm(StepProjection()), setting, 2.5),
        Config(f"eigenspace, flat, {k}", "eigenspace", Projected(flat), setting, read),
        Config(f"eigenspace, per layer, {k}", "eigenspace", Projected(replace(flat, per=PerLayer())), setting, read),
        Config(f"OGD, {k}", OGD, Projected(Eigenspace(OutputGradient(), Rank(k), examples=k)), setting, read),
    ]
    if part == WIDE:
        return found
    moving = replace(setting, momentum=MOMENTUM, rate=setting.rate * (1 - MOMENTUM))
    return [
        *found,
        *(Config(name, name, penalised(name, strength), setting, 1.0) for name, strength in STRENGTHS.items()),
        Config(f"replay, {REPLAYED}", "replay", Rehearsal(REPLAYED / (setting.tasks * setting.size)), setting, 1.4),
        Config("GPM, momentum, gradient", GPM, gpm(GradientProjection()), moving, 2.5),
        Config("GPM, momentum, step", GPM, gpm(StepProjection()), moving, 2.5),
        Config(MULTITASK, MULTITASK, Multitask(), setting),
    ]


def gpm(projection: Projection) -> Projected:
    """Gradient projection memory with the paper's thresholds, 0.95 for the first layer and 0.99 for the others, and 300
    examples of each task."""
    return Projected(InputSpace((Energy(0.95, PIXELS), Energy(0.99, PIXELS)), examples=300), projection)


def penalised(name: str, strength: float) -> Method:
    """A kind of elastic weight consolidation at a strength."""
    return AvalancheEWC(strength) if name == EWC else Ours(strength, Fisher(), Diagonal(), Accumulate())


@dataclass(frozen=True)
class ProjectionsOptions(Options):
    """None leaves what the setting has; no `method` is all rows of the part."""

    seeds: Annotated[int, positive()] = 1
    """run seeds 0 to SEEDS - 1"""
    part: Annotated[str, one_of("part", PARTS)] = MAIN
    """wide: more directions a task, one epoch; tune: strengths, on seeds from 1000 on"""
    tasks: Annotated[int | None, positive()] = None
    """default: 10"""
    epochs: Annotated[int | None, positive()] = None
    """of each task; default: 5, for wide 1"""
    examples: Annotated[int | None, positive()] = None
    """training images of a task; default: all"""
    rank: Annotated[int | None, positive("K")] = None
    """directions a task; default: 20, for wide 100"""
    method: tuple[str, ...] = ()
    """one row, by its label; repeatable"""


class Projections(Experiment):
    """What each choice of protected directions keeps of the past, and what it leaves to learn."""

    name = "projections"
    options_type = ProjectionsOptions

    def variant(self, options: ProjectionsOptions) -> str:
        return "" if options.part == MAIN else options.part

    def configs(self, options: ProjectionsOptions) -> Sequence[Config]:
        known = {config.label: config for config in rows(setting_for(options), options.part, options.rank)}
        return selected("method", known, options.method or None)

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        """Learn one task after another; the number of tasks learned is the step of a record."""
        seed += config.first_seed
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
        scalars = {"average_accuracy": mean(rows[-1]), "seconds": trainer.seconds}
        if len(rows) > 1:
            of_tasks = summary(rows)
            scalars |= {"learned": of_tasks["learned"], "backward_transfer": -of_tasks["forgetting"]}
        yield from ({"metric": name, "value": value} for name, value in scalars.items())
        for task, value in enumerate(rows[-1], start=1):
            yield {"metric": "final_accuracy", "value": value, "step": task}


def setting_for(options: ProjectionsOptions) -> Setting:
    """The setting that the options ask for; with `quick`, two tasks of a few digits that need no download. Raises
    UsageError where MNIST is absent."""
    setting = Setting(epochs=1 if options.part == WIDE else 5)
    if options.quick:
        setting = Setting("digits", tasks=2, size=100, epochs=1, hidden=20)
    check(setting.images, options.dataset_root)
    asked: dict[str, Any] = {"tasks": options.tasks, "epochs": options.epochs, "size": options.examples}
    return replace(setting, **{name: value for name, value in asked.items() if value is not None})


def stream(setting: Setting, seed: int, dataset_root: Path | None, *, at_once: bool) -> TensorStream:
    """Permutations of the images, normalised as Avalanche normalises MNIST."""
    images = read(setting.images, setting.size, 0, dataset_root)
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


experiment = Projections()
