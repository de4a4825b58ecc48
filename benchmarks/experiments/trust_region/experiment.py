"""Accuracy against the number of refreshes: from one at each task's end to replay, with the same stored examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import (
    GGN,
    AdaptiveRefresh,
    AllStored,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    MatrixFree,
    PermutedDigits,
    Rank,
    Refresh,
    RelativeError,
    SineBoundary,
    SplitDigits,
    Structure,
    penalty_metrics,
)
from benchmarks.experiments.trust_region import frontier
from benchmarks.harness import Context, Experiment, Options, Record, UsageError
from benchmarks.harness.options import one_of, positive
from benchmarks.methods import AvalancheEWC, MemoryReplay, Method, Ours, Plain, Rehearsal
from benchmarks.storage import stored_bytes
from benchmarks.streams.makers import mnist_pairs
from benchmarks.training import CosinePerExperience, TimedEvaluation, Trainer, learner, summary, test_sets

MAIN, FRONTIER = PARTS = ("main", "frontier")
MEMORIES = (200, 1000, 2000)  # images in all
BUDGETS = (30, 100, 300)  # steps of each task
NAIVE, EWC, REPLAY = "Naive", "Avalanche's EWC", "replay"
PER_TASK, WITH_SLOPE = "refresh per task", "refresh per task, slope"
TOLERANCES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
MNIST_TOLERANCES = (0.5, 0.2, 0.1, 0.05)
CHOSEN = 0.1
CAPS = (3, 6)
HIDDEN = 100  # ReLU units in one layer
TESTED = 2000  # examples of each test set at most


@dataclass(frozen=True)
class Setting:
    """What all methods share on a stream: Adam at `rate`, `steps` steps an experience, and the part of its examples
    that is stored; the network has so many inputs and outputs."""

    stream: str
    inputs: int
    outputs: int
    experiences: int
    steps: int
    batch: int
    rate: float
    memory: float
    cosine: bool = False
    weight_decay: float = 0.0
    mnist: bool = False
    domain: bool = False


@dataclass(frozen=True)
class Config:
    """One method on one stream. `tolerance` is that of a row on the curve of the figure: adaptive, without a cap and
    with the structure of the other rows."""

    name: str
    method: Method
    setting: Setting
    tolerance: float | None = None

    @property
    def label(self) -> str:
        return f"{self.setting.stream}, {self.name}"

    @property
    def cost(self) -> float:
        return 5.0 if self.setting.mnist else 1.0


@dataclass(frozen=True)
class Point:
    """One method with a memory of so many images in all; the setting has its steps."""

    name: str
    images: int
    method: Method
    setting: Setting

    @property
    def label(self) -> str:
        return f"{self.name}, {self.images:,} images, {self.setting.steps} steps"


SETTINGS = {
    setting.stream: setting
    for setting in (
        Setting("sine", 2, 2, 9, 100, 32, 1e-2, memory=0.1, cosine=True, weight_decay=1e-3),
        Setting("split_digits", 64, 10, 5, 100, 64, 1e-3, memory=40 / 288),
        Setting("permuted_digits", 64, 10, 5, 60, 64, 3e-3, memory=0.1),
        Setting("split_mnist", 784, 10, 5, 300, 64, 1e-3, memory=1 / 300, mnist=True),
        Setting("split_mnist_domain", 784, 2, 5, 300, 64, 1e-3, memory=1 / 300, mnist=True, domain=True),
    )
}
STRENGTHS = {  # `run tune --target trust_region --seeds 2 --dataset-root DIR`
    ("sine", EWC): 100000.0,
    ("sine", PER_TASK): 1.0,
    ("sine", WITH_SLOPE): 1.0,
    ("split_digits", EWC): 10000.0,
    ("split_digits", PER_TASK): 100.0,
    ("split_digits", WITH_SLOPE): 100.0,
    ("permuted_digits", EWC): 1000.0,
    ("permuted_digits", PER_TASK): 10.0,
    ("permuted_digits", WITH_SLOPE): 1.0,
    ("split_mnist", EWC): 10000.0,
    ("split_mnist", PER_TASK): 1.0,
    ("split_mnist", WITH_SLOPE): 100.0,
    ("split_mnist_domain", EWC): 100000.0,
    ("split_mnist_domain", PER_TASK): 100.0,
    ("split_mnist_domain", WITH_SLOPE): 10.0,
}


EXAMPLES = {"split_mnist": 60_000, "split_digits": 1_440}  # of training, of which memories are a part


@dataclass(frozen=True)
class TrustRegionOptions(Options):
    """Ten seeds, and every stream that can be had, unless asked for others."""

    seeds: Annotated[int, positive()] = 10
    """run seeds 0 to SEEDS - 1"""
    stream: Annotated[str | None, one_of("stream", SETTINGS)] = None
    """default: all, MNIST with --dataset-root"""
    part: Annotated[str, one_of("part", PARTS)] = MAIN
    """main: accuracy against refreshes; frontier: accuracy against processor time and bytes, on split MNIST; take
    --jobs 1, since a second job would disturb the times"""


class TrustRegion(Experiment):
    """Final accuracy on all tasks, refreshes in each task, and the price of both."""

    name = "trust_region"
    options_type = TrustRegionOptions

    def variant(self, options: TrustRegionOptions) -> str:
        return options.part if options.part == FRONTIER else options.stream or ""

    def configs(self, options: TrustRegionOptions) -> Sequence[Config | Point]:
        if options.part == FRONTIER:
            return points(options)
        return [config for setting in settings(options) for config in rows(setting, options.quick)]

    def run(self, config: Config | Point, seed: int, context: Context) -> list[Record]:
        """Train on all experiences; accuracy on all test sets after each."""
        setting = config.setting
        benchmark = stream(setting, seed, context.dataset_root)
        experiences = list(benchmark.train_stream)
        torch.manual_seed(seed)  # every method starts from the same weights
        model = nn.Sequential(nn.Linear(setting.inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, setting.outputs))
        metrics = penalty_metrics(every=10) if isinstance(config, Config) else ()  # which take processor time, too
        evaluation = TimedEvaluation(*metrics, loggers=[TensorboardLogger(context.tensorboard_dir)])
        plugins = config.method.plugins(sum(len(e.dataset) for e in experiences))
        plugins += [CosinePerExperience(setting.steps)] if setting.cosine else []
        strategy = learner(model, setting, plugins, evaluation, weight_decay=setting.weight_decay)
        trainer, tests = Trainer(strategy, evaluation), test_sets(benchmark, TESTED)
        records = [record for found in trainer.course(experiences, tests) for record in found]
        refreshes = sum(len(p.past.refreshes) for p in strategy.plugins if isinstance(p, CurvatureEWCPlugin))
        scalars = summary(trainer.rows) | {
            "refreshes": refreshes / (len(experiences) - 1),  # during a task, per task after the first
            "seconds": trainer.seconds,
            "processor_seconds": trainer.processor_seconds,
            "stored_bytes": float(stored_bytes(strategy)),
        }
        return records + [{"metric": name, "value": value} for name, value in scalars.items()]


def points(options: TrustRegionOptions) -> list[Point]:
    """Class-incremental split MNIST at each memory and budget; with `quick`, one of each on digits. Raises UsageError
    for MNIST without its folder, and for a stream."""
    if options.stream:
        raise UsageError(f"--part {FRONTIER} has a stream of its own: leave --stream out.")
    if options.dataset_root is None and not options.quick:
        raise UsageError(f"--part {FRONTIER} reads MNIST: give --dataset-root DIR, or --quick.")
    setting = SETTINGS["split_digits" if options.quick else "split_mnist"]
    setting = replace(setting, experiences=2) if options.quick else setting
    memories, budgets = ((200,), (10,)) if options.quick else (MEMORIES, BUDGETS)
    found = []
    for images in memories:
        part = images / EXAMPLES[setting.stream]
        for steps in budgets:
            own = replace(setting, memory=part, steps=steps)
            found += [Point(name, images, method, own) for name, method in frontier.methods(part).items()]
    return found


def settings(options: TrustRegionOptions) -> list[Setting]:
    """The streams asked for; with `quick`, two experiences of a few steps on those that need no download.

    Raises UsageError where MNIST is asked for by name without its folder."""
    known = [SETTINGS[options.stream]] if options.stream else list(SETTINGS.values())
    if options.stream and known[0].mnist and options.dataset_root is None:
        raise UsageError(f"stream '{options.stream}' reads MNIST: give --dataset-root DIR.")
    chosen = [s for s in known if options.dataset_root is not None or not s.mnist]
    return [replace(s, experiences=2, steps=10) for s in chosen] if options.quick else chosen


def rows(setting: Setting, quick: bool) -> list[Config]:
    """The methods of a stream, from the loosest to the tightest, between what forgets and what replays. Those that
    adapt have strength 1: the criterion plus the summed loss of past experiences, as in replay."""
    usual: Structure = Dense() if setting.stream == "sine" else LowRank(Rank(20))

    def adaptive(tolerance: float, cap: int | None = None, structure: Structure = usual) -> Method:
        policy = AdaptiveRefresh(RelativeError(tolerance), max_refreshes=cap, look=AllStored(), fraction=setting.memory)
        return Ours(1.0, GGN(), structure, policy)

    tuned = {name: STRENGTHS[setting.stream, name] for name in (EWC, PER_TASK, WITH_SLOPE)}
    found: dict[str, Method] = {NAIVE: Plain(), EWC: AvalancheEWC(tuned[EWC])}
    for name, slope in ((PER_TASK, False), (WITH_SLOPE, True)):
        found[name] = Ours(tuned[name], GGN(), usual, Refresh(setting.memory, gradient=slope))
    found["refresh per task, slope, damped"] = adaptive(CHOSEN, cap=0)
    tolerances = (CHOSEN,) if quick else MNIST_TOLERANCES if setting.mnist else TOLERANCES
    curve = {f"adaptive {tolerance:g}": tolerance for tolerance in tolerances}
    found |= {name: adaptive(tolerance) for name, tolerance in curve.items()}
    found |= {f"adaptive {CHOSEN:g}, at most {cap}": adaptive(CHOSEN, cap) for cap in CAPS}
    if setting.stream == "split_digits":
        others: dict[str, Structure] = {
            "diagonal": Diagonal(),
            "Kronecker": Kronecker(),
            "matrix-free": MatrixFree(),
        }
        found |= {f"adaptive {CHOSEN:g}, {name}": adaptive(CHOSEN, None, s) for name, s in others.items()}
    found |= {REPLAY: MemoryReplay(1.0, setting.memory), "Avalanche's Replay": Rehearsal(setting.memory)}
    return [Config(name, method, setting, curve.get(name)) for name, method in found.items()]


def stream(setting: Setting, seed: int, dataset_root: Path | None) -> Any:
    """The benchmark of a setting."""
    count = setting.experiences
    if setting.mnist:
        return mnist_pairs(count, seed, dataset_root, domain=setting.domain)
    if setting.stream == "sine":
        return SineBoundary(count, seed=seed)
    if setting.stream == "permuted_digits":
        return PermutedDigits(count, seed=seed)
    whole = SplitDigits(5, seed=seed)
    whole.streams["train"] = whole.train_stream[:count]
    whole.streams["test"] = whole.test_stream[:count]
    return whole


experiment = TrustRegion()
