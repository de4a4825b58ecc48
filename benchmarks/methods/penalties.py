"""Avalanche's penalties on weights or outputs, and Synaptic Intelligence as its paper has it."""

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
from torch import Tensor

from benchmarks.methods.base import Method


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
    """Synaptic Intelligence as in its paper, where `strength` is c; because Avalanche 0.6 has it without effect on a
    CPU."""

    strength: float
    damping: float = 0.1

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [PathIntegral(self.strength, damping=self.damping)]


class PathIntegral(SupervisedPlugin):
    """Adds strength · Σ_k Ω_k (θ̃_k − θ_k)² to the loss, by its gradient (Zenke et al. 2017, equations 3 to 5).

    Along each experience ω_k = −Σ_s g_k(s) (θ_k(s + 1) − θ_k(s)), with g the gradient of the task's loss alone at step
    s. At its end Ω_k ← max(0, Ω_k + ω_k / ((θ_k − θ_k(0))² + damping)) and θ̃ ← θ. The maximum is not in the paper: a
    negative importance pushes weights away without bound. Parameters that come later, and rows that a head grows, start
    without importance.
    """

    def __init__(self, strength: float, *, damping: float) -> None:
        super().__init__()
        self.strength, self.damping = strength, damping
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self.path: dict[str, Tensor] = {}
        self.step: dict[str, tuple[Tensor, Tensor]] = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.start = {name: p.detach().clone() for name, p in strategy.model.named_parameters()}
        self.path = {name: torch.zeros_like(value) for name, value in self.start.items()}

    @torch.no_grad()
    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        used = {name: p for name, p in strategy.model.named_parameters() if p.grad is not None}
        self.step = {name: (p.grad.clone(), p.clone()) for name, p in used.items() if p.grad is not None}
        for name in used.keys() & self.importance.keys():
            p, anchor = used[name], self.anchor[name]
            old = tuple(map(slice, anchor.shape))
            p.grad[old] += 2 * self.strength * self.importance[name] * (p[old] - anchor)

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        parameters = dict(strategy.model.named_parameters())
        for name, (gradient, before) in self.step.items():
            self.path[name] -= gradient * (parameters[name] - before)

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.anchor = {name: p.detach().clone() for name, p in strategy.model.named_parameters() if p.requires_grad}
        for name, value in self.anchor.items():
            gained = self.path[name] / ((value - self.start[name]) ** 2 + self.damping)
            if name in self.importance:
                gained[tuple(map(slice, self.importance[name].shape))] += self.importance[name]
            self.importance[name] = gained.clamp(min=0)
        self.start, self.path, self.step = {}, {}, {}


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
