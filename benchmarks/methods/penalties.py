"""Avalanche's penalties on weights or outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.plugins import (
    EWCPlugin,
    LwFPlugin,
    MASPlugin,
    RWalkPlugin,
    SupervisedPlugin,
    SynapticIntelligencePlugin,
)

from benchmarks.methods.base import Method
from benchmarks.methods.path_integral import PathIntegral


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
class FixedSI(Method):
    """Synaptic Intelligence as in its paper; see `PathIntegral`. `strength` is the paper's c."""

    strength: float
    damping: float = 0.1

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [PathIntegral(self.strength, damping=self.damping)]


@dataclass(frozen=True)
class MAS(Method):
    """Avalanche's Memory Aware Synapses (Aljundi et al. 2018)."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [NonZeroLoss(), MASPlugin(lambda_reg=self.strength)]


class NonZeroLoss(SupervisedPlugin):
    """Adds the smallest normal number to the loss, which changes no gradient: MASPlugin takes a loss of exactly zero,
    as two heads of a finished task give, for one that is missing, and raises."""

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.loss = strategy.loss + torch.finfo(strategy.loss.dtype).tiny


@dataclass(frozen=True)
class RWalk(Method):
    """Avalanche's Riemannian Walk (Chaudhry et al. 2018)."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [GrowingRWalk(ewc_lambda=self.strength)]


class GrowingRWalk(RWalkPlugin):
    """RWalk that starts its sums after new heads are there, and has a score after experiences of few steps; otherwise
    Avalanche's."""

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        return None

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        super().before_training(strategy, *args, **kwargs)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_iterations < self.delta_t:
            self._update_score(strategy)  # scores that are all zero would be divided by zero
        super().after_training_exp(strategy, *args, **kwargs)


@dataclass(frozen=True)
class LwF(Method):
    """Avalanche's Learning without Forgetting."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [LwFPlugin(alpha=self.strength)]
