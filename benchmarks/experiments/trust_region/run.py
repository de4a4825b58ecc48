"""One run of the trust region experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from avalanche.logging import TensorboardLogger
from torch import nn

from avalanche_curv import CurvatureEWCPlugin, PermutedDigits, SineBoundary, SplitDigits, penalty_metrics
from benchmarks.experiments.trust_region import Config, Setting
from benchmarks.harness.experiment import Context, Record
from benchmarks.storage import stored_bytes
from benchmarks.streams.makers import mnist_pairs
from benchmarks.training import CosinePerExperience, TimedEvaluation, Trainer, learner, summary, test_sets

NETWORKS = {  # inputs, hidden, outputs
    "sine": (2, 100, 2),
    "split_digits": (64, 100, 10),
    "permuted_digits": (64, 100, 10),
    "split_mnist": (784, 100, 10),
    "split_mnist_domain": (784, 100, 2),
}
TESTED = 2000  # examples of each test set at most


def run(config: Config, seed: int, context: Context) -> list[Record]:
    """Train on all experiences; accuracy on all test sets after each."""
    setting = config.setting
    benchmark = stream(setting, seed, context.dataset_root)
    experiences = list(benchmark.train_stream)
    torch.manual_seed(seed)  # every method starts from the same weights
    strategy, evaluation = build(config, sum(len(e.dataset) for e in experiences), context)
    trainer, tests = Trainer(strategy, evaluation), test_sets(benchmark, TESTED)
    records = [record for found in trainer.course(experiences, tests) for record in found]
    scalars = summary(trainer.rows) | {
        "refreshes": refreshes(strategy) / (len(experiences) - 1),
        "seconds": trainer.seconds,
        "stored_bytes": float(stored_bytes(strategy)),
    }
    return records + [{"metric": name, "value": value} for name, value in scalars.items()]


def stream(setting: Setting, seed: int, dataset_root: Path | None) -> Any:
    """The benchmark of a setting."""
    count = setting.experiences
    if setting.mnist:
        return mnist_pairs(count, seed, dataset_root, domain=setting.stream.endswith("domain"))
    if setting.stream == "sine":
        return SineBoundary(count, seed=seed)
    if setting.stream == "permuted_digits":
        return PermutedDigits(count, seed=seed)
    whole = SplitDigits(5, seed=seed)
    whole.streams["train"] = whole.train_stream[:count]
    whole.streams["test"] = whole.test_stream[:count]
    return whole


def build(config: Config, examples: int, context: Context) -> tuple[Any, TimedEvaluation]:
    """Naive with the plugins of the method, a ReLU network with one hidden layer, Adam."""
    setting = config.setting
    inputs, hidden, outputs = NETWORKS[setting.stream]
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    evaluation = TimedEvaluation(*penalty_metrics(every=10), loggers=[TensorboardLogger(context.tensorboard_dir)])
    plugins = config.method.plugins(examples)
    if setting.cosine:
        plugins = [*plugins, CosinePerExperience(setting.steps)]
    strategy = learner(model, setting, plugins, evaluation, weight_decay=setting.weight_decay)
    return strategy, evaluation


def refreshes(strategy: Any) -> float:
    """How often the picture was drawn anew during experiences."""
    found = [plugin for plugin in strategy.plugins if isinstance(plugin, CurvatureEWCPlugin)]
    return float(sum(len(plugin.past.refreshes) for plugin in found))
