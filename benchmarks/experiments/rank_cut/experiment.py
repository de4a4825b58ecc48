"""A rank cut beyond the number of parameters freezes them, though the accuracy of batches fluctuates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import Eigenspace, Fisher, OrthogonalProjectionPlugin, Rank, SineBoundary
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.training import CosinePerExperience, TimedEvaluation, accuracies, learner, mean, test_sets

RANKS = (10, 100, 300, 500, 1000)
NULL = 1e-7  # of the largest eigenvalue of a task: below this its loss does not bend, but for rounding
TESTED = 1000


@dataclass(frozen=True)
class Config:
    """One rank cut on the sine stream, with the model and the training of `refresh`."""

    label: str
    rank: int
    experiences: int = 9
    steps: int = 100
    batch: int = 32
    rate: float = 1e-2
    weight_decay: float = 1e-3


class RankCut(Experiment):
    """Free dimensions, distance from each task's start and accuracy of every mini-batch, by rank."""

    name = "rank_cut"

    def configs(self, options: Options) -> Sequence[Config]:
        size = {"experiences": 3, "steps": 10} if options.quick else {}
        return [Config(f"rank {rank}", rank, **size) for rank in RANKS]

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Train on all tasks; batch accuracy and distance at every step, the rest at each task's end."""
        benchmark = SineBoundary(config.experiences, seed=seed)
        torch.manual_seed(seed)  # every rank starts from the same weights
        model = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 2))
        cut = OrthogonalProjectionPlugin(Eigenspace(Fisher(), Rank(config.rank), examples=None))
        watcher = Watcher()
        evaluation = TimedEvaluation(loggers=[TensorboardLogger(context.tensorboard_dir)])
        plugins = [cut, CosinePerExperience(config.steps), watcher]
        strategy = learner(model, config, plugins, evaluation, weight_decay=config.weight_decay)
        tests, records, size = test_sets(benchmark, TESTED), [], sum(p.numel() for p in model.parameters())
        past, present, noise = [], [], []
        for number, experience in enumerate(benchmark.train_stream):
            free = size - cut.protected.used
            strategy.train(experience, eval_streams=[])
            row = accuracies(model, tests)
            step = strategy.clock.train_iterations
            records += [{"metric": "free", "value": free, "step": step}, {"metric": f"free/{number}", "value": free}]
            if number:
                past.append(mean(row[:number]))
                present.append(row[number])
                noise.append(fluctuation(watcher.batches[-config.steps :], len(experience.dataset)))
        records += [{"metric": "batch_accuracy", "value": v, "step": i} for i, (v, _) in enumerate(watcher.batches)]
        records += [{"metric": "distance", "value": v, "step": i} for i, v in enumerate(watcher.distance)]
        found, expected = zip(*noise)
        scalars = {
            "past": past[-1], "present": mean(present), "average": mean(row), "bent": bent(cut),
            "largest_distance": max(watcher.distance[config.steps :]),
            "fluctuation": mean([*found]) ** 0.5, "sampling": mean([*expected]) ** 0.5,
        }
        return records + [{"metric": name, "value": value} for name, value in scalars.items()]


class Watcher(SupervisedPlugin):
    """The accuracy of each mini-batch before its step and its size, and ‖θ − a‖₂ after it, with a the parameters at the
    start of the task."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[float, int]] = []
        self.distance: list[float] = []
        self._start: list[torch.Tensor] = []

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._start = [p.detach().clone() for p in strategy.model.parameters()]

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        right = strategy.mb_output.argmax(1) == strategy.mb_y
        self.batches.append((right.double().mean().item(), len(right)))
        moved = ((p.detach() - a).double() for p, a in zip(strategy.model.parameters(), self._start))
        self.distance.append(sum(float(part.square().sum()) for part in moved) ** 0.5)


def fluctuation(batches: Sequence[tuple[float, int]], examples: int) -> tuple[float, float]:
    """The variance of the accuracies a_i of batches of b_i, and what drawing them without replacement from N examples
    gives where the model stands still: the mean of p (1 − p) / b_i · (N − b_i) / (N − 1), p = Σ b_i a_i / Σ b_i.

    >>> fluctuation([(1.0, 2), (0.5, 2)], examples=4)                      # 0.75 · 0.25 / 2 · 2 / 3
    (0.0625, 0.0625)
    """
    p = sum(a * b for a, b in batches) / sum(b for _, b in batches)
    expected = [p * (1 - p) / b * (examples - b) / (examples - 1) for _, b in batches]
    return mean([(a - p) ** 2 for a, _ in batches]), mean(expected)


def bent(cut: OrthogonalProjectionPlugin) -> float:
    """Along how many of the first task's directions its loss bends at all."""
    (block,) = cut.protected.blocks.values()
    values = block.subspace.shares[0].values
    return float((values > NULL * values.max()).sum())


experiment = RankCut()
