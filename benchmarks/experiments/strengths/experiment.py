"""λ chosen from what a learner has, by evidence or on its first tasks, beside a λ that was tuned for the stream."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from avalanche_curv import (
    Accumulate,
    Curvature,
    CurvatureEWCPlugin,
    Diagonal,
    EmpiricalRisk,
    Evidence,
    Kronecker,
    Merge,
    Policy,
    QuadraticModel,
    StrengthRule,
    Structure,
    TaskEvidence,
    choose_strength,
    task_evidence,
)
from avalanche_curv.core import NonFiniteCurvatureError
from avalanche_curv.streams._benchmark import benchmark
from benchmarks.data import ALL, CLASSES, check, read
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.harness.errors import selected
from benchmarks.harness.options import one_of
from benchmarks.harness.tuning import FIRST_SEED
from benchmarks.networks import many_heads, mlp
from benchmarks.streams.features import RandomReLU
from benchmarks.streams.scenario import CLASS, DOMAIN, TASK
from benchmarks.streams.whole_batches import Examples, TensorStream, plain_trainer
from benchmarks.training import accuracies, summary

MAIN, TUNE, EVIDENCE = PARTS = ("main", "tune", "evidence")
TRIED = tuple(10.0**power for power in range(-1, 6))


@dataclass(frozen=True)
class Setting:
    """A stream of five tasks, of `train` random images each, and as it is learned: `steps` steps of Adam at `rate` with
    batches of `batch`, on a ReLU network with hidden layers of these widths. `held` further images of each task are
    looked at by those who choose by them. `tuned` is the best of `run strengths --part tune`.

    Scenario `task`: two classes a task, with a head for each; `class`: two, with one head for all; `domain`: all
    classes, with their pixels permuted. `features` is how many random ReLU features are seen of an image; 0 for pixels.
    """

    stream: str
    images: str
    scenario: str
    hidden: tuple[int, ...]
    structure: Structure
    policy: Policy
    tuned: float
    train: int = 2000
    held: int = 500
    tasks: int = 5
    features: int = 0
    steps: int = 200
    batch: int = 64
    rate: float = 1e-3


SETTINGS = (
    Setting(
        "split MNIST, task-incremental", "mnist", TASK, (100,), Diagonal(), Accumulate(), 1000.0, rate=1e-2,
    ),
    Setting(
        "permuted MNIST", "mnist", DOMAIN, (100, 100), Kronecker(), Merge(fraction=0.25), 10.0,
        train=5000,
    ),
    Setting(
        "split Fashion features, class-incremental", "fashion", CLASS, (), Kronecker(), Accumulate(),
        1000.0, features=400,
    ),
)  # fmt: skip


class Choice(ABC):
    """How λ is chosen."""

    tasks: ClassVar[int | None] = None
    """How many of the tasks are learned; None for all."""

    @abstractmethod
    def train(self, make: Callable[[float | StrengthRule], Any], tasks: Sequence[Any], held: Sequence[Any]) -> Learned:
        """A strategy of `make` that has learned all tasks. Raises NonFiniteCurvatureError where it diverged."""


@dataclass(frozen=True)
class Learned:
    """The strategy, and how many tasks were trained in all for it."""

    strategy: Any
    trained: int
    scalars: dict[str, float] = field(default_factory=dict)
    """What else is known of it."""


@dataclass(frozen=True)
class Given(Choice):
    """A number, or a rule of the learner."""

    strength: float | Evidence

    def train(self, make: Callable[[float | StrengthRule], Any], tasks: Sequence[Any], held: Sequence[Any]) -> Learned:
        strategy = make(self.strength)
        for task in tasks:
            strategy.train(task)
        return Learned(strategy, len(tasks))


@dataclass(frozen=True)
class OnFirst(Choice):
    """The best on what is held out of the first `count` tasks, of those that `suggest_strength` gives after a run at
    100; the others are then learned with it."""

    count: int

    def train(self, make: Callable[[float | StrengthRule], Any], tasks: Sequence[Any], held: Sequence[Any]) -> Learned:
        chosen = choose_strength(make, tasks[: self.count], held[: self.count])
        for task in tasks[self.count :]:
            chosen.strategy.train(task)
        first = min(self.count, len(tasks))
        return Learned(chosen.strategy, len(chosen.scores) * first + len(tasks) - first)


class Watching(StrengthRule):
    """A strength that stays, and the `evidence` of the newest task at it."""

    def __init__(self, strength: float) -> None:
        self.first = strength
        self.evidence: TaskEvidence | None = None

    def check(
        self, risk: EmpiricalRisk, curvature: Curvature, structure: Structure, policy: Policy,
        past: QuadraticModel | None,
    ) -> None:
        """Nothing is chosen."""

    def next(
        self, strength: float, past: QuadraticModel, risk: EmpiricalRisk, curvature: Curvature, structure: Structure,
        examples: int,
    ) -> float:
        self.evidence = task_evidence(past, risk, curvature, structure, examples)
        return strength


@dataclass(frozen=True)
class TwoTasks(Choice):
    """A number, for two tasks, and the terms of the evidence of the second."""

    strength: float
    tasks = 2

    def train(self, make: Callable[[float | StrengthRule], Any], tasks: Sequence[Any], held: Sequence[Any]) -> Learned:
        rule = Watching(self.strength)
        strategy = make(rule)
        for task in tasks[:2]:
            strategy.train(task)
        found = rule.evidence
        if found is None:
            raise RuntimeError("The second task has no evidence: it was not absorbed.")
        fit, prior = -found.examples * found.loss, -0.5 * found.examples * self.strength * found.distance
        log = found.log(self.strength)
        return Learned(strategy, 2, {
            "log_evidence": log, "fit": fit, "prior": prior, "volume": log - fit - prior,
            "determined": found.determined(self.strength), "directions": found.relative.numel(), "next": found.best(),
        })  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A stream and a choice of λ."""

    label: str
    setting: Setting
    choice: Choice
    name: str
    first_seed: int = 0


def choices(setting: Setting) -> dict[str, Choice]:
    """By name, the cheapest first."""
    return {
        "λ = 0, nothing kept": Given(0.0),
        "λ = 1": Given(1.0),
        "λ = 100": Given(100.0),
        "by evidence": Given(Evidence()),
        "by evidence, from 100": Given(Evidence(first=100.0)),
        "on the first three tasks": OnFirst(3),
        "on all tasks": OnFirst(setting.tasks),
        "tuned on another seed": Given(setting.tuned),
    }


@dataclass(frozen=True)
class StrengthsOptions(Options):
    """No `stream` is all of them."""

    part: Annotated[str, one_of("part", PARTS)] = MAIN
    """tune: each strength, on seeds from 1000 on, by the held-out images; evidence: its terms at several strengths"""
    stream: tuple[str, ...] = ()
    """one stream, by its name; repeatable"""


class Strengths(Experiment):
    """Average accuracy by how λ is chosen."""

    name = "strengths"
    options_type = StrengthsOptions

    def variant(self, options: StrengthsOptions) -> str:
        return "" if options.part == MAIN else options.part

    def configs(self, options: StrengthsOptions) -> Sequence[Config]:
        """With `quick`, a few steps on three tasks of digits that need no download. Raises UsageError for an unknown
        stream, and where images are absent."""
        known = {setting.stream: setting for setting in SETTINGS}
        found = selected("stream", known, options.stream or None)
        if options.quick:
            small: dict[str, Any] = {"images": "digits", "tasks": 3, "steps": 10, "train": 100, "held": 30}
            found = [replace(one, **small, features=min(one.features, 20)) for one in found]
        for setting in found:
            check(setting.images, options.dataset_root)
        if options.part == TUNE:
            return [
                Config(f"{setting.stream}, {strength:g}", setting, Given(strength), f"{strength:g}", FIRST_SEED)
                for setting in found for strength in TRIED
            ]  # fmt: skip
        if options.part == EVIDENCE:
            return [
                Config(f"{setting.stream}, {strength:g}", setting, TwoTasks(strength), f"{strength:g}")
                for setting in found for strength in TRIED[1:6]
            ]  # fmt: skip
        return [
            Config(f"{setting.stream}, {name}", setting, choice, name)
            for setting in found for name, choice in choices(setting).items()
        ]  # fmt: skip

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        """Learn all tasks. Weights that diverge end the run, without an accuracy."""
        seed += config.first_seed
        train, held, test = tasks_of(config.setting, seed, context.dataset_root)
        streams = [_stream(config.setting, parts) for parts in (train, held)]

        def make(strength: float | StrengthRule) -> Any:
            return build(config.setting, strength, streams[0], seed)

        tasks, watched = ([*one.benchmark.train_stream] for one in streams)
        try:
            learned = config.choice.train(make, tasks, watched)
        except NonFiniteCurvatureError:
            yield {"metric": "average_accuracy", "value": math.nan}
            return
        tested = (held if config.first_seed else test)[: config.choice.tasks]
        tasks_told = [part.task for part in tested] if config.setting.scenario == TASK else None
        row = accuracies(learned.strategy.model, [part.all() for part in tested], tasks_told)
        (strength,) = (one.strength for one in learned.strategy.plugins if isinstance(one, CurvatureEWCPlugin))
        scalars = {"average_accuracy": summary([row])["average_accuracy"], "trained": learned.trained / len(tasks)}
        scalars |= learned.scalars
        if strength:
            scalars["log_strength"] = math.log10(strength)
        yield from ({"metric": f"accuracy/task_{task}", "value": value} for task, value in enumerate(row))
        yield from ({"metric": name, "value": value} for name, value in scalars.items())


Parts = tuple[Examples, ...]


def tasks_of(setting: Setting, seed: int, dataset_root: Path | None) -> tuple[Parts, Parts, Parts]:
    """What is trained on in each task, what is held out, and what is tested on; drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(CLASSES, generator=generator)
    found: tuple[list[Examples], ...] = ([], [], [])
    seen, tested = read(setting.images, ALL, 0, dataset_root)
    side = math.prod(seen.shape)
    for task in range(setting.tasks):
        pair = order[2 * task : 2 * task + 2]
        chosen, rest = (_places(part.targets, None if setting.scenario == DOMAIN else pair) for part in (seen, tested))
        chosen = chosen[torch.randperm(len(chosen), generator=generator)][: setting.train + setting.held]
        moved = torch.randperm(side, generator=generator) if setting.scenario == DOMAIN else None
        cut = len(chosen) * setting.train // (setting.train + setting.held)
        places = (seen, chosen[:cut]), (seen, chosen[cut:]), (tested, rest)
        for parts, (images, at) in zip(found, places):
            some = replace(images, pixels=images.pixels[at], targets=images.targets[at])
            inputs = RandomReLU(setting.features).of(some) if setting.features else some.vectors()
            targets = (some.targets == pair[1]).long() if setting.scenario == TASK else some.targets
            label = task if setting.scenario == TASK else 0
            parts.append(Examples(inputs if moved is None else inputs[:, moved], targets, task=label))
    return tuple(found[0]), tuple(found[1]), tuple(found[2])


def _places(targets: Tensor, classes: Tensor | None) -> Tensor:
    return torch.arange(len(targets)) if classes is None else torch.isin(targets, classes).nonzero()[:, 0]


def _stream(setting: Setting, parts: Parts) -> TensorStream:
    outputs = 2 if setting.scenario == TASK else CLASSES
    found = benchmark([(part, part) for part in parts], [part.task for part in parts], outputs)
    return TensorStream(found, parts, parts)


def build(setting: Setting, strength: float | StrengthRule, found: TensorStream, seed: int) -> Any:
    """A new strategy; those of one seed start from the same weights and see the same batches."""
    torch.manual_seed(seed)
    sizes = found.parts[0].inputs.shape[1], *setting.hidden
    if setting.scenario == TASK:
        model: nn.Module = many_heads(mlp(*sizes).append(nn.ReLU()), sizes[-1], 2, setting.tasks)
    else:
        model = mlp(*sizes, CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate, fused=True)
    plugin = CurvatureEWCPlugin(strength, structure=setting.structure, policy=setting.policy)
    return plain_trainer(found, model, optimizer, [plugin], batch=setting.batch, steps=setting.steps).strategy


experiment = Strengths()
