"""What a method of a comparison is, and what all methods of one comparison share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Learner:
    """What all methods of a comparison share: good for one strategy, which changes its model and optimiser."""

    model: nn.Module
    optimizer: Optimizer
    criterion: nn.Module
    batch: int
    epochs: int
    """Of each experience; `benchmarks.training.Steps` among the plugins ends it earlier."""
    examples: int
    """Training examples of the whole stream, of which memories are a fraction."""
    classes: int
    """Outputs of the model, or of each head."""
    evaluator: EvaluationPlugin
    plugins: Sequence[SupervisedPlugin] = ()
    """Behind those of the method."""


class Method:
    """A way to train on a stream: Naive fine-tuning with the plugins it adds, unless it says otherwise.

    Subclasses are frozen dataclasses, so that a configuration can hold them.
    """

    joint: ClassVar[bool] = False
    """Whether ``strategy.train`` is called once, with all experiences, instead of once with each."""
    pictured: ClassVar[bool] = True
    """Whether fidelity can picture the loss it trains with: one whose form for a single example is known."""

    @property
    def strategy(self) -> type:
        """The Avalanche strategy that the plugins join."""
        return Naive

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        """New plugins, for a stream of so many training examples in all."""
        return []

    def options(self, learner: Learner) -> dict[str, Any]:
        """Further arguments of the strategy."""
        return {}

    def build(self, learner: Learner) -> Any:
        """The strategy. Its model is ``strategy.model``, which need not stay the learner's."""
        return self.strategy(
            model=learner.model,
            optimizer=learner.optimizer,
            criterion=learner.criterion,
            **common(learner, self.plugins(learner.examples)),
            **self.options(learner),
        )

    def with_strength(self, strength: float) -> Method:
        """The same method at another strength. Raises TypeError where there is none to tune."""
        if "strength" not in {field.name for field in fields(self)}:  # type: ignore[arg-type]
            raise TypeError(f"{type(self).__name__} has no strength to tune. Give it an empty grid.")
        return replace(self, strength=strength)  # type: ignore[type-var]


def common(learner: Learner, plugins: Sequence[SupervisedPlugin]) -> dict[str, Any]:
    """The arguments that every strategy of Avalanche takes."""
    return {
        "train_mb_size": learner.batch,
        "eval_mb_size": learner.batch,
        "train_epochs": learner.epochs,
        "plugins": [*plugins, *learner.plugins],
        "evaluator": learner.evaluator,
    }
