"""Any mitigator of the loss of plasticity, as an Avalanche plugin."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plugins import _bridge


class MitigatorPlugin(SupervisedPlugin):
    """Lets a mitigator work around each training step of a strategy, beside any other plugin.

    Gradients are added between the backward pass and the step, after plugins that clip or project them. What works
    between two tasks (`AfterTask()`) waits until the next one begins, before the model grows for it: the first is
    evaluated and remembered by then, and the last is followed by none. An online stream that hides its boundaries has
    no ends of tasks. What the mitigator keeps is pickled with the strategy, so that a resumed run goes on as it would
    have.

    Raises TypeError for what is no mitigator, and before training where its options do not fit the model.
    """

    def __init__(self, mitigator: Mitigator) -> None:
        super().__init__()
        if not isinstance(mitigator, Mitigator):
            hint = f"Call it: {mitigator.__name__}(...)." if isinstance(mitigator, type) else "Give L2Init(1e-3), say."
            raise TypeError(f"MitigatorPlugin needs a mitigator; got {mitigator!r}. {hint}")
        self.mitigator = mitigator
        self._task_ends = _bridge.TaskEnds()
        self._between_tasks = False

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        if self._between_tasks:
            self.mitigator.after_task(strategy.model, strategy.optimizer)
            self._between_tasks = False

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.mitigator.prepare(strategy.model)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.mitigator.before_step(strategy.model, strategy.optimizer)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self.mitigator.after_step(strategy.model, strategy.optimizer)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._between_tasks = _bridge.tells_tasks(strategy) and self._task_ends.here(strategy)
