"""One run of the sources experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from avalanche_curv import Curvature, CurvatureEWCPlugin, EmpiricalRisk, Past, Policy, SineBoundary, Structure
from avalanche_curv.core.quadratic.policies import part_of
from benchmarks.experiments.sources import Config
from benchmarks.experiments.sources.watcher import Watched, Watcher
from benchmarks.harness.experiment import Context, Record
from benchmarks.methods import MemoryReplay
from benchmarks.training import CosinePerExperience, TimedEvaluation, Trainer, learner, mean, test_sets


@dataclass(frozen=True)
class OnPart(Policy):
    """A policy that sees a random part of each experience only, so that all policies know the same examples."""

    policy: Policy
    fraction: float

    @property
    def revises(self) -> bool:  # type: ignore[override]
        return self.policy.revises

    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        return self.policy.absorb(past, part_of(risk, self.fraction, 0, past.experiences), curvature, structure)

    def revise(
        self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure
    ) -> Past:
        return self.policy.revise(past, model, iteration, curvature, structure)



def run(config: Config, seed: int, context: Context) -> list[Record]:
    """Train along the trajectory; the error of every picture, averaged over it, and the final accuracy."""
    benchmark = SineBoundary(config.setting.experiences, seed=seed)
    torch.manual_seed(seed)
    strategy, watcher = build(config)
    trainer = Trainer(strategy, strategy.evaluator)
    for experience in benchmark.train_stream:
        trainer.train(experience)
    accuracy = mean(trainer.accuracies(test_sets(benchmark, 1000)))
    records: list[Record] = [{"metric": "accuracy", "value": accuracy}, {"metric": "seconds", "value": trainer.seconds}]
    for one in watcher.watched:
        names = {"policy": one.picture.policy_name, "kind": one.picture.kind_name,
                 "structure": one.picture.structure_name}
        count = len(one.past.refreshes) / (config.setting.experiences - 1)
        values = {"error": mean(one.error), "gamma": mean(one.gamma), "refreshes": count}
        if one.kappa:
            values["kappa"] = mean(one.kappa)
        records += [{"metric": metric, "value": value, **names} for metric, value in values.items()]
    return records



def build(config: Config) -> tuple[Any, Watcher]:
    """Naive with what makes the trajectory, and the watcher."""
    setting = config.setting
    model = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 2))
    ewc = None
    plugins: list[Any] = [CosinePerExperience(setting.steps)]
    if config.trajectory == "regularised":
        (picture,) = config.pictures
        policy = OnPart(picture.policy, setting.memory)
        ewc = CurvatureEWCPlugin(
            config.strength, curvature=picture.curvature, structure=picture.structure, policy=policy
        )
        plugins.insert(0, ewc)
    elif config.trajectory == "replay":
        plugins = MemoryReplay(1.0, setting.memory).plugins(0) + plugins
    watcher = Watcher([Watched(p) for p in config.pictures], ewc, setting.memory, setting.every)
    evaluation = TimedEvaluation(loggers=[])
    strategy = learner(model, setting, [*plugins, watcher], evaluation, weight_decay=setting.weight_decay)
    return strategy, watcher
