"""The methods that are compared: each knows the plugins it is made of, and what it stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training import Cumulative, Naive
from avalanche.training.plugins import (
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    SupervisedPlugin,
    SynapticIntelligencePlugin,
)
from torch import Tensor

from avalanche_curv import CurvatureEWCPlugin
from avalanche_curv.core import Curvature, Policy, Structure
from avalanche_curv.core.batches import random_part
from avalanche_curv.core.policies import part_seed


class Method(ABC):
    """A way to train on a stream; frozen, so that a configuration can hold it."""

    @abstractmethod
    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        """New plugins, for a stream of so many training examples in all."""

    @property
    def strategy(self) -> type:
        """The Avalanche strategy that the plugins join."""
        return Naive


@dataclass(frozen=True)
class Plain(Method):
    """Naive fine-tuning."""

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return []


@dataclass(frozen=True)
class Joint(Method):
    """Avalanche's Cumulative: trains on all examples so far, an upper bound that stores everything."""

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return []

    @property
    def strategy(self) -> type:
        return Cumulative


@dataclass(frozen=True)
class Rehearsal(Method):
    """Avalanche's Replay with a memory of `fraction` of all examples."""

    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [ReplayPlugin(mem_size=round(self.fraction * examples))]


@dataclass(frozen=True)
class MemoryReplay(Method):
    """Adds strength · Σ_t L_t(θ) of stored examples, all of them at each step: what a quadratic model stands for.

    The examples are those that a policy with the same `fraction` and `seed` stores.
    """

    strength: float
    fraction: float
    seed: int = 0

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [MemoryLoss(self.strength, self.fraction, self.seed)]


class MemoryLoss(SupervisedPlugin):
    """See `MemoryReplay`."""

    def __init__(self, strength: float, fraction: float, seed: int) -> None:
        super().__init__()
        self.strength, self.fraction, self.seed = strength, fraction, seed
        self.memory: list[tuple[Tensor, Tensor]] = []

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.memory:
            inputs, targets = zip(*self.memory)
            outputs = strategy.model(torch.cat(inputs)).split([len(y) for y in targets])
            losses = [strategy._criterion(out, y) for out, y in zip(outputs, targets)]
            strategy.loss = strategy.loss + self.strength * torch.stack(losses).sum()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        dataset = strategy.experience.dataset.eval()
        part = random_part(len(dataset), self.fraction, part_seed(self.seed, len(self.memory)))
        items = [dataset[int(index)] for index in part]
        self.memory.append((torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])))


@dataclass(frozen=True)
class AvalancheEWC(Method):
    """Avalanche's EWC; `decay` makes it the online form."""

    strength: float
    decay: float | None = None

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        mode = "separate" if self.decay is None else "online"
        return [EWCPlugin(self.strength, mode=mode, decay_factor=self.decay)]


@dataclass(frozen=True)
class SI(Method):
    """Avalanche's Synaptic Intelligence."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [SynapticIntelligencePlugin(si_lambda=self.strength)]


@dataclass(frozen=True)
class MAS(Method):
    """Avalanche's Memory Aware Synapses."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [MASPlugin(lambda_reg=self.strength)]


@dataclass(frozen=True)
class LwF(Method):
    """Avalanche's Learning without Forgetting."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [LwFPlugin(alpha=self.strength)]


@dataclass(frozen=True)
class Ours(Method):
    """CurvatureEWC."""

    strength: float
    curvature: Curvature
    structure: Structure
    policy: Policy

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [
            CurvatureEWCPlugin(
                self.strength, curvature=self.curvature, structure=self.structure, policy=self.policy
            )
        ]
