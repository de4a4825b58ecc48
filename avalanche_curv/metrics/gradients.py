"""The gradients of the task and of the penalty, which a step of `CurvatureEWC` adds up: their norms and angle."""

from __future__ import annotations

import math
from typing import Any

import torch
from avalanche.evaluation.metric_results import MetricValue
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_parameters
from avalanche_curv.metrics._published import ScalarMetric, finite
from avalanche_curv.plugins import CurvatureEWCPlugin, _bridge


class GradientMetric(ScalarMetric):
    """Publishes `gradient/task_norm`, `gradient/penalty_norm` and `gradient/cosine` every n iterations, after the
    backward pass.

    The penalty's gradient is Σ strength · (g + C δ) over the strategy's CurvatureEWCPlugins, with the strength that
    their guards allow, zero for parameters that came later; the task's gradient is that of the parameters less it.
    Without a past there is no penalty, and only the norm of the task is published; a cosine with a zero gradient is
    not. Where a plugin clips or scales gradients in `after_backward`, the difference is no gradient of the task. A
    measurement takes a product of each penalty's curvature with θ − anchor, about as long as the penalty of a step.
    """

    def after_backward(self, strategy: Any) -> list[MetricValue]:
        if not self.due(strategy):
            return []
        space = _space(strategy)
        total, penalty = _current_gradient(strategy.model, space), _penalty_gradient(strategy, space)
        if penalty is None:
            values = {"task_norm": float(total.norm())}
        else:
            task = total - penalty
            values = {
                "task_norm": float(task.norm()),
                "penalty_norm": float(penalty.norm()),
                "cosine": cosine(task, penalty),
            }
        return self.publish(strategy, finite("gradient", values))


def _space(strategy: Any) -> ParameterSpace:
    """The trainable parameters, and those of the past that have been frozen since."""
    space = _bridge.current_space(strategy)
    for plugin in strategy.plugins:
        if isinstance(plugin, CurvatureEWCPlugin) and plugin.past.model is not None:
            space = space.union(plugin.past.model.space)
    return space


def _current_gradient(model: nn.Module, space: ParameterSpace) -> Float[Tensor, "P"]:
    """The gradient that the parameters have, with zeros where they have none."""
    named = canonical_parameters(model)
    parameters = [named[name] for name in space.names]
    return space.flatten([torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters])


def _penalty_gradient(strategy: Any, space: ParameterSpace) -> Float[Tensor, "P"] | None:
    """Σ weight · ∇q over the plugins, in the coordinates of the current model; None where none has a past."""
    total = None
    for plugin in strategy.plugins:
        past = plugin.past.model if isinstance(plugin, CurvatureEWCPlugin) else None
        if past is None:
            continue
        own = plugin.weight * past.gradient_at(past.displacement(strategy.model))
        total = own.new_zeros(space.size) if total is None else total
        total.index_add_(0, space.positions(past.space).to(own.device), own.to(total))
    return total


def cosine(a: Tensor, b: Tensor) -> float:
    """aᵀb / (‖a‖ ‖b‖), NaN where either is zero.

    >>> cosine(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 4.0]))
    -0.6
    """
    lengths = float(a.double().norm() * b.double().norm())
    return max(-1.0, min(1.0, float(a.double() @ b.double()) / lengths)) if lengths > 0 else math.nan
