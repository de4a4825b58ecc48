"""Elastic weight consolidation with any curvature, structure and policy, as an Avalanche plugin."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.options import Configured, Fixed, Forwarded, Setting, check_count
from avalanche_curv.core.quadratic.policies import Accumulate, Drawing, Past, Policy
from avalanche_curv.core.quadratic.regularizer import CurvatureRegularizer, with_rule
from avalanche_curv.core.quadratic.stability import Guard, WarnIfUnstable, suggest_strength
from avalanche_curv.core.quadratic.strength import StrengthRule
from avalanche_curv.core.risk.forward import Forward
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.core.state import State, check_state, state_of
from avalanche_curv.core.structures import Diagonal, Structure
from avalanche_curv.plugins import _bridge, _outputs, _tasks, _trained_loss
from avalanche_curv.plugins._effect import EarlierClasses

LOG = logging.getLogger("avalanche_curv")


class CurvatureEWCPlugin(Configured, SupervisedPlugin):
    """Adds the penalty of a `CurvatureRegularizer` to the training loss: strength · q(θ), with q the quadratic model of
    the loss on past experiences.

    With the defaults, q = Σ_t ½ Σ_i F_{t,i} (θ_i − a_{t,i})² over past experiences t, with F_t the exact diagonal
    Fisher of the mean loss at the anchor a_t (Kirkpatrick et al. 2017, eq. 3). `strength`, `curvature`, `structure`,
    `policy`, `guard`, `past`, `include` and `exclude` are those of `CurvatureRegularizer`, which says what they do and
    which of them may be set at any time; `regularizer` is that object. `weight` is the strength of the last step, as
    the guard allowed it, and `last_penalty` q(θ) there. Each plugin is guarded by itself: several penalties add up.

    Avalanche's EWC has no ½ and squares mini-batch gradients: its `ewc_lambda` equals strength / 2 with
    `curvature=BatchedEmpiricalFisher(batch_size=train_mb_size)`: both train equal weights with
    `train(experience, shuffle=False)`; shuffled, Avalanche's importance pass moves the global random state. Strength 0
    trains exactly as without the plugin. `batch_size` is how many examples are loaded at once; results do not depend
    on it.

    An online stream that hides where its tasks end, such as `split_online_stream(...)` by default, is taken part by
    part, each at its own end, without a second look at earlier ones. Not the parts count but their examples:
    `examples_per_experience` of them weigh as much as one experience of a stream of tasks, 1,000 by default. So the
    strength does not depend on how a task is cut, and is that of the stream of tasks where it is set to their size.
    With `access_task_boundaries=True` each task is absorbed at its end, with all of its examples. Policies that store
    examples take in whole experiences only, and structures whose sums grow with each part are refused (TypeError).

    Where the loop and the backward pass are Avalanche's own, the gradient is added to that of the loss right after the
    backward pass, and the value to `strategy.loss`: one pass over the parameters for a diagonal (see
    `CurvatureRegularizer.add`). Where they are not, or something acts in between (a hook on a parameter's gradient, a
    plugin's `before_backward` after this one or `after_backward` before it, as found at the start of each epoch), the
    penalty is a term of the loss. Metrics see the same loss and gradients.

    It warns once of a penalty that moves no step, with what to try next, and once where an evaluation after an
    experience finds no more of the classes of earlier ones than guessing would, whether metrics are attached or not.
    Neither changes training.

    Raises TypeError or ValueError for unusable options when it is made; before the first step of an experience for
    whatever would keep it from being absorbed at its end, which is tried on four of its examples: a criterion without
    per-example form, a strategy that trains another loss than its criterion, an empty experience, several tasks in one
    experience of a multi-task model, a model without trainable parameters or without those of `past`, or that cannot be
    copied, selectors that fit no parameter, or (MemoryError) a matrix over its structure's limit;
    NonFiniteCurvatureError at the end of an experience that diverged: `past` then still holds what came before.
    """

    batch_size = Setting(check_count)
    examples_per_experience = Setting(partial(check_count, hint="As many weigh as much as one experience."))
    regularizer = Fixed[CurvatureRegularizer]()
    rule, strength = Forwarded("regularizer"), Forwarded("regularizer")
    guard, past = Forwarded("regularizer"), Forwarded("regularizer")
    curvature, structure, policy = Forwarded("regularizer"), Forwarded("regularizer"), Forwarded("regularizer")
    selection = Forwarded("regularizer")
    include, exclude = Forwarded("regularizer"), Forwarded("regularizer")

    def __init__(
        self,
        strength: float | StrengthRule,
        *,
        curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
        structure: Structure = Diagonal(),  # noqa: B008
        policy: Policy = Accumulate(),  # noqa: B008
        guard: Guard | None = WarnIfUnstable(),  # noqa: B008
        batch_size: int = 256,
        examples_per_experience: int = 1000,
        past: Past = Past(),  # noqa: B008
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__()
        self.batch_size, self.examples_per_experience = batch_size, examples_per_experience
        self.regularizer = CurvatureRegularizer(
            strength, curvature=curvature, structure=structure, policy=policy, guard=guard, past=past,
            include=include, exclude=exclude,
        )
        self._task_ends, self._classes = _tasks.TaskEnds(), EarlierClasses()
        self._said = False  # that nothing is left of earlier classes
        self._in_parts = False  # since a stream was met that hides where its tasks end
        self._beside = False  # whether gradients are added to after the backward pass, in place of a term of the loss

    def described(self) -> Iterable[str]:
        return with_rule(super().described(), self.rule, self.strength)

    @property
    def weight(self) -> float:
        """The strength of the last step, which is lower than `strength` where the guard says so."""
        return self.regularizer.weight

    @property
    def last_penalty(self) -> Tensor | None:
        """q(θ) at the last step, without strength; None before there is a past."""
        return self.regularizer.last_penalty

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        _bridge.check_once(self, strategy)
        if self.strength > 0:
            _trained_loss.check_backward(strategy)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        _bridge.check_experience(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if not (self._in_parts or _tasks.tells_tasks(strategy)):
            self._begin_parts(strategy)
        _bridge.preflight(strategy, self.regularizer.check_risk, self.selection, _tasks.told_data)
        self._classes.begin(_outputs.classes_of(strategy))
        with _naming_the_experience(strategy):
            self.regularizer.begin(strategy.model, strategy.optimizer)

    def _begin_parts(self, strategy: Any) -> None:
        self.regularizer.check_parts(_tasks.updates_of(strategy))
        self._in_parts = True
        LOG.info(
            "This online stream hides where its tasks end. Its parts are absorbed one by one and weigh by their "
            "examples, %d of them as much as one experience (examples_per_experience).", self.examples_per_experience
        )

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self._beside = _trained_loss.adds_beside_the_loss(strategy, self)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if not self._beside:
            strategy.loss = strategy.loss + self.regularizer.penalty(strategy.model, strategy.optimizer)

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self._beside and (added := self.regularizer.add(strategy.model, strategy.optimizer)) is not None:
            strategy.loss = strategy.loss + added  # a number: no graph, no gradient
        self.regularizer.look(strategy.optimizer, strategy.model)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        with _naming_the_experience(strategy):
            self.regularizer.revise(strategy.model)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._classes.end()
        whole = _tasks.tells_tasks(strategy)
        if whole and not self._task_ends.here(strategy):
            return
        with _naming_the_experience(strategy):
            policy, part, count = self.policy, None, len(_tasks.told_data(strategy.experience))
            if whole and isinstance(policy, Drawing) and (places := policy.places(self.past, count)) is not None:
                policy, part = policy.of_all(), places.tolist()  # no other example is loaded
            risk = _bridge.current_risk(strategy, self.batch_size, part, self.selection, _tasks.told_data)
            share = None if whole else count / self.examples_per_experience
            self.regularizer.absorb_risk(risk, share, _bridge.current_number(strategy), policy, count)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        self._classes.restart()

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if (found := _outputs.predicted(strategy)) is not None:
            self._classes.see(*found)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        speaking = (p for p in strategy.plugins if isinstance(p, CurvatureEWCPlugin) and p.strength > 0)
        if next(speaking, None) is self and (kept := self._classes.kept).nothing and not self._said:
            self._said = True
            suggestion = suggest_strength(self.past, strategy.optimizer, strategy.model)
            message = kept.in_words(self.strength, bool(self.past.stored), suggestion)
            warnings.warn(message, UserWarning, stacklevel=outside())

    def state_dict(self) -> State:
        """What the plugin knows between two experiences, as tensors, numbers, strings, tuples and dictionaries, for
        `torch.save`: the state of its regularizer, and how far an online stream is in its task. Options are not in it.

        Raises TypeError for a past that is not made of these (see `Past.state_dict`).
        """
        return state_of(
            type(self).__name__, regularizer=self.regularizer.state_dict(), task_ends=self._task_ends.state_dict()
        )

    def load_state_dict(
        self, state: State, *, model: nn.Module | None = None, criterion: object = None, forward: Forward | None = None
    ) -> None:
        """Takes over what `state_dict` returned, as by `torch.load(path, weights_only=True)`, of a plugin with the same
        options: with the model loaded too, training goes on to the bit as it would have, under SGD without momentum.
        Avalanche clears what other optimizers know when a new strategy begins; there use `save_checkpoint`.

        `model`, `criterion` and `forward` are needed where the past holds stored examples, and as in
        `Past.load_state_dict`.
        Raises ValueError for any other state, with what came, and for a past that the policy cannot go on from,
        TypeError for one of another structure; the plugin is then as it was.
        """
        parts = check_state(state, type(self).__name__, "regularizer", "task_ends")["fields"]
        self.regularizer.load_state_dict(parts["regularizer"], model=model, criterion=criterion, forward=forward)
        self._task_ends.load_state_dict(parts["task_ends"])


@contextmanager
def _naming_the_experience(strategy: Any) -> Iterator[None]:
    try:
        yield
    except NonFiniteCurvatureError as error:
        raise NonFiniteCurvatureError(f"Experience {_bridge.current_number(strategy)}: {error}") from error
