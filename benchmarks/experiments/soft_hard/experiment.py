"""A penalty against a projection on the same subspaces: accuracy on the past and on the present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn.utils import parameters_to_vector

from avalanche_curv import (
    Accumulate,
    CurvatureEWCPlugin,
    Eigenspace,
    Fisher,
    FlatSpectrum,
    LowRank,
    OrthogonalProjectionPlugin,
    PermutedDigits,
    Rank,
    SplitDigits,
)
from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.harness.options import positive
from benchmarks.training import TimedEvaluation, Trainer, learner, mean, stacked, test_sets

RANKS = (5, 20, 50, 100)
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
NAIVE, HARD, FLAT, TRUE = "Naive", "hard", "soft, flat", "soft, true"
TESTED = 2000


@dataclass(frozen=True)
class Setting:
    """What all methods share on a stream: Adam at `rate`, `steps` steps a task, and the number of examples of each task
    whose Fisher gives the subspace, None for all."""

    stream: str
    outputs: int
    steps: int
    rate: float
    examples: int | None
    experiences: int = 5
    batch: int = 64


@dataclass(frozen=True)
class Config:
    """One method on one stream; Naive has neither rank nor strength, the projection no strength."""

    label: str
    method: str
    setting: Setting
    rank: int | None = None
    strength: float | None = None


SETTINGS = (
    Setting("permuted_digits", 10, steps=60, rate=3e-3, examples=144),
    Setting("split_digits_domain", 2, steps=100, rate=1e-3, examples=None),
)


@dataclass(frozen=True)
class SoftHardOptions(Options):
    """Three seeds unless asked for others."""

    seeds: Annotated[int, positive()] = 3
    """run seeds 0 to SEEDS - 1"""


class SoftHard(Experiment):
    """Each rank with the projection, and with both penalties at every strength."""

    name = "soft_hard"
    options_type = SoftHardOptions

    def configs(self, options: Options) -> Sequence[Config]:
        if options.quick:
            settings = [replace(setting, experiences=2, steps=10, examples=50) for setting in SETTINGS]
            return [config for setting in settings for config in rows(setting, RANKS[:1], STRENGTHS[2:4])]
        return [config for setting in SETTINGS for config in rows(setting, RANKS, STRENGTHS)]

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Train on all tasks; accuracy on all test sets after each."""
        whole = stream(config.setting, seed)
        experiences = list(whole.train_stream)
        torch.manual_seed(seed)  # every method starts from the same weights
        model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, config.setting.outputs))
        evaluation = TimedEvaluation(loggers=[TensorboardLogger(context.tensorboard_dir)])
        strategy = learner(model, config.setting, plugins(config, len(experiences[0].dataset)), evaluation)
        trainer, places = Trainer(strategy, evaluation), []
        records: list[Record] = []
        for found in trainer.course(experiences, test_sets(whole, TESTED)):
            records += found
            places.append(parameters_to_vector(model.parameters()).detach())
        moved = mean([float((new - old).norm()) for old, new in pairwise(places)])
        scalars = past_and_present(trainer.rows) | {"moved": moved, "seconds": trainer.seconds}
        return records + [{"metric": name, "value": value} for name, value in scalars.items()]


def rows(setting: Setting, ranks: Sequence[int], strengths: Sequence[float]) -> list[Config]:
    """All methods on a stream."""
    found = [Config(f"{setting.stream}, {NAIVE}", NAIVE, setting)]
    for rank in ranks:
        name = f"{setting.stream}, rank {rank}"
        found.append(Config(f"{name}, {HARD}", HARD, setting, rank))
        found += [
            Config(f"{name}, {soft}, {strength:g}", soft, setting, rank, strength)
            for soft in (FLAT, TRUE)
            for strength in strengths
        ]
    return found


def past_and_present(accuracies: list[list[float]]) -> dict[str, float]:
    """Of the accuracy a_tj on task j after task t = 1, …, T: past = mean_{j<T} a_Tj, present = mean_{t>1} a_tt, and the
    average mean_j a_Tj.

    >>> past_and_present([[0.9, 0.1], [0.5, 0.8]])
    {'past': 0.5, 'present': 0.8, 'average': 0.65}
    """
    last = accuracies[-1]
    return {
        "past": mean(last[:-1]),
        "present": mean([row[t] for t, row in enumerate(accuracies)][1:]),
        "average": mean(last),
    }


def plugins(config: Config, examples: int) -> list[SupervisedPlugin]:
    """The method, where the first experience has so many examples. Eigenspace and Accumulate of one seed draw the same
    ones of each experience, for experiences of one size or where all are taken."""
    if config.method == NAIVE or config.rank is None:
        return []
    cut, count = Rank(config.rank), config.setting.examples
    if config.method == HARD:
        return [OrthogonalProjectionPlugin(Eigenspace(Fisher(), cut, examples=count))]
    structure = FlatSpectrum(LowRank(cut)) if config.method == FLAT else LowRank(cut)
    policy = Accumulate() if count is None else Accumulate(fraction=count / examples)
    return [CurvatureEWCPlugin(config.strength or 0.0, curvature=Fisher(), structure=structure, policy=policy)]


def stream(setting: Setting, seed: int) -> Any:
    """Permuted digits; or two digits in each experience, told apart as 0 and 1."""
    if setting.stream == "permuted_digits":
        return PermutedDigits(setting.experiences, seed=seed)
    whole = SplitDigits(5, seed=seed)
    pairs = list(zip(whole.train_stream, whole.test_stream))[: setting.experiences]
    return benchmark([(_told_apart(train), _told_apart(test)) for train, test in pairs], [0] * len(pairs), 2)


def _told_apart(experience: Any) -> Examples:
    inputs, targets = stacked(experience.dataset.eval())
    return Examples(inputs, (targets != targets.min()).long())


experiment = SoftHard()
