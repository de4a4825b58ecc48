"""Synaptic Intelligence as its paper has it, because Avalanche 0.6 has it without effect on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn


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
        self.anchor = {name: p.clone() for name, p in _trained(strategy.model)}
        for name, value in self.anchor.items():
            gained = self.path[name] / ((value - self.start[name]) ** 2 + self.damping)
            if name in self.importance:
                gained[tuple(map(slice, self.importance[name].shape))] += self.importance[name]
            self.importance[name] = gained.clamp(min=0)
        self.start, self.path, self.step = {}, {}, {}


def _trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
