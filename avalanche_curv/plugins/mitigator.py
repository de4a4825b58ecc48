"""The Avalanche plugin for any mitigator of the loss of plasticity."""

from __future__ import annotations

from functools import partial
from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from avalanche_curv.core.options import Configured, Fixed, check_kind
from avalanche_curv.core.state import State, check_state, state_of
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plugins import _bridge, _tasks


class MitigatorPlugin(Configured, SupervisedPlugin):
    """Applies a mitigator around each training step of a strategy, beside any other plugin.

    Gradients are added between the backward pass and the step, after plugins that clip or project them.
    `mitigator.after_task` (for `AfterTask()`) is called when the next task begins, before the model grows for it: the
    task that ended has been evaluated and remembered by then. It is not called after the last task. The mitigator's
    state is pickled with the strategy, so that a resumed run equals an uninterrupted one.

    Raises TypeError for an argument that is no mitigator, and ValueError before training if its options do not fit the
    model, and in an online stream that hides where its tasks end for a mitigator that acts there.
    """

    mitigator = Fixed[Mitigator](partial(check_kind, kind=Mitigator, example="L2Init(1e-3)"))

    def __init__(self, mitigator: Mitigator) -> None:
        super().__init__()
        self.mitigator = mitigator
        self._task_ends = _tasks.TaskEnds()
        self._between_tasks = False
        self._is_copy = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _is_copy=True)

    def state_dict(self) -> State:
        """What the plugin and its mitigator know between two experiences, as tensors, numbers, strings and
        dictionaries, for `torch.save`. Options are not in it."""
        return state_of(
            type(self).__name__, mitigator=self.mitigator.state_dict(), between_tasks=self._between_tasks,
            task_ends=self._task_ends.state_dict(),
        )

    def load_state_dict(self, state: State) -> None:
        """Takes over what `state_dict` returned, as by `torch.load(path, weights_only=True)`, of a plugin with the same
        options. Raises ValueError for any other state, with what came."""
        parts = check_state(state, type(self).__name__, "mitigator", "between_tasks", "task_ends")["fields"]
        self.mitigator.load_state_dict(parts["mitigator"])
        self._task_ends.load_state_dict(parts["task_ends"])
        self._between_tasks, self._is_copy = parts["between_tasks"], True

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        _bridge.check_once(self, strategy)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        if self.mitigator.acts_between_tasks and not _tasks.tells_tasks(strategy):
            raise ValueError(
                f"{self.mitigator} acts between tasks, and this online stream hides where they end. Split it with "
                "access_task_boundaries=True, or let it act by steps: when=EverySteps(100)."
            )
        if self._between_tasks:
            self.mitigator.after_task(strategy.model, strategy.optimizer)
            self._between_tasks = False

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.mitigator.prepare(strategy.model)
        self._is_copy = False

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        if self._is_copy:  # made in the middle of an experience
            self.mitigator.prepare(strategy.model)
            self._is_copy = False

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.mitigator.before_step(strategy.model, strategy.optimizer)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self.mitigator.after_step(strategy.model, strategy.optimizer)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._between_tasks = _tasks.tells_tasks(strategy) and self._task_ends.here(strategy)
