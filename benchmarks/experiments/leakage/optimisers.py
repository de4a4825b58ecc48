"""The optimisers under which projections are compared, and what they do to a projected gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin

from avalanche_curv import GradientProjection, SequentialProjection, StepProjection

PROJECTIONS = {"step": StepProjection(), "gradient": GradientProjection(), "sequential": SequentialProjection()}


class ClipValues(SupervisedPlugin):
    """Clips each entry of the gradient to ±0.01."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_value_(strategy.model.parameters(), 0.01)


class ClipNorm(SupervisedPlugin):
    """Clips the norm of the gradient to 0.1."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.1)


class FreshState(SupervisedPlugin):
    """Clears the optimiser's state as an experience begins."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        strategy.optimizer.state.clear()


@dataclass(frozen=True)
class Optimiser:
    """A class of torch.optim with its options; `plugin` acts after the projection plugin."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    plugin: type[SupervisedPlugin] | None = None

    def make(self, model: torch.nn.Module) -> Any:
        return self.kind(model.parameters(), **self.options)

    def plugins(self) -> list[SupervisedPlugin]:
        return [] if self.plugin is None else [self.plugin()]


SGD, MOMENTUM, ADAM = {"lr": 0.1}, {"lr": 0.02, "momentum": 0.9}, {"lr": 1e-3}
OPTIMISERS = {
    "SGD": Optimiser(torch.optim.SGD, SGD),
    "SGD, norm clipped": Optimiser(torch.optim.SGD, SGD, ClipNorm),
    "SGD, values clipped": Optimiser(torch.optim.SGD, SGD, ClipValues),
    "SGD, weight decay": Optimiser(torch.optim.SGD, {**SGD, "weight_decay": 1e-3}),
    "momentum, fresh": Optimiser(torch.optim.SGD, MOMENTUM, FreshState),
    "momentum, stale": Optimiser(torch.optim.SGD, MOMENTUM),
    "Adam, fresh": Optimiser(torch.optim.Adam, ADAM, FreshState),
    "Adam": Optimiser(torch.optim.Adam, ADAM),
    "AdamW": Optimiser(torch.optim.AdamW, {**ADAM, "weight_decay": 1e-2}),
    "RMSprop": Optimiser(torch.optim.RMSprop, ADAM),
}
QUICK = ("SGD", "momentum, stale")
