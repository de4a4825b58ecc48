"""What a method of a comparison is, what all methods of one comparison share, and the bounds: nothing kept, everything
kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from avalanche.training import Cumulative, JointTraining, Naive
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
    """How to train on a stream: Naive fine-tuning with the plugins it adds, unless it says otherwise.

    Subclasses are frozen dataclasses, so that a configuration can hold them.
    """

    joint: ClassVar[bool] = False
    """Whether all experiences are learned at once, instead of one after another."""
    has_example_loss: ClassVar[bool] = True
    """Whether the loss of a single example has a known form, of which fidelity needs a quadratic model."""

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
        """The method at another strength. Raises TypeError where there is none to tune."""
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


@dataclass(frozen=True)
class Plain(Method):
    """Naive fine-tuning."""


@dataclass(frozen=True)
class Joint(Method):
    """Avalanche's Cumulative: trains on all examples so far, an upper bound that stores everything."""

    @property
    def strategy(self) -> type:
        return Cumulative


@dataclass(frozen=True)
class AllAtOnce(Method):
    """Avalanche's JointTraining: ``strategy.train`` is called once, with all experiences; the bound of what can be
    learned."""

    joint: ClassVar[bool] = True

    @property
    def strategy(self) -> type:
        return JointTraining


@dataclass(frozen=True)
class Multitask(Method):
    """Naive training on a stream whose single experience has the examples of all tasks, the same bound."""

    joint: ClassVar[bool] = True
