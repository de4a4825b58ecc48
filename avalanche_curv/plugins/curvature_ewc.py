"""Elastic weight consolidation with any curvature, structure and policy, as an Avalanche plugin."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.options import Configured, Fixed, Forwarded, Setting, check_count, check_kind, check_number
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.penalty import Penalty, check_takes_dense_gradients
from avalanche_curv.core.quadratic.policies import Accumulate, Past, Policy
from avalanche_curv.core.quadratic.stability import (
    Guard,
    Guarded,
    StrengthSuggestion,
    WarnIfUnstable,
    check_guard,
    suggest_strength,
)
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.core.risk.selection import ParameterSelector, Selection, selection_of
from avalanche_curv.core.state import State, check_state, state_of
from avalanche_curv.core.structures import Diagonal, Structure
from avalanche_curv.core.structures.rules import check_pair
from avalanche_curv.plugins import _bridge
from avalanche_curv.plugins._effect import EarlierClasses, StepEffect, idle

LOG = logging.getLogger("avalanche_curv")


class CurvatureEWCPlugin(Configured, SupervisedPlugin):
    """Adds strength · q(θ) to the training loss, with q the quadratic model of the loss on past experiences.

    With the defaults, q = Σ_t ½ Σ_i F_{t,i} (θ_i − a_{t,i})² over past experiences t, with F_t the exact diagonal
    Fisher of the mean loss at the anchor a_t (Kirkpatrick et al. 2017, eq. 3). The gradient is exact.

    `strength` is λ and means the same for every curvature and structure. Avalanche's EWC has no ½ and squares
    mini-batch gradients: its `ewc_lambda` equals strength / 2 with
    `curvature=BatchedEmpiricalFisher(batch_size=train_mb_size)`: both train equal weights with
    `train(experience, shuffle=False)`; shuffled, Avalanche's importance pass moves the global random state. Strength 0
    trains exactly as without the plugin.

    `guard` looks at each new model of the past under SGD: where lr · strength · λ_max(C) says that the penalty alone
    diverges, it warns (`WarnIfUnstable()`), lowers the strength for as long as that model is in use
    (`RescaleIfUnstable()`), or raises (`StopIfUnstable()`); None does not look. It looks at the rate of each parameter
    group, again where a rate or the strength changes, and at each plugin by itself: several penalties add up.
    `batch_size` is how many examples are loaded at once; results do not depend on it.

    An online stream that hides where its tasks end, such as `split_online_stream(...)` by default, is taken part by
    part, each at its own end, without a second look at earlier ones. Not the parts count but their examples:
    `examples_per_experience` of them weigh as much as one experience of a stream of tasks, 1,000 by default. So the
    strength does not depend on how a task is cut, and is that of the stream of tasks where it is set to their size.
    With `access_task_boundaries=True` each task is absorbed at its end, with all of its examples. Policies that store
    examples take in whole experiences only, and structures whose sums grow with each part are refused (TypeError).

    It warns once, with what to try next, after an experience where its part was below 1e-3 of the length of every step
    that was looked at (updates 8, 16, 32, ...; `suggest_strength`), and once where an evaluation after an experience
    finds no more of the classes of earlier ones than guessing would, whether metrics are attached or not. Neither
    changes training.

    `strength`, `guard` and `past` may be set at any time and act from the next step on, so that the strength may follow
    a schedule; `weight` is the strength of the last step, as the guard allowed it, and `penalty` q(θ) there. Others of
    the arguments cannot be changed. `past` holds the quadratic model, what the policy stores and, of
    `AdaptiveRefresh`, every refresh with its reason, which are also logged to the logger `avalanche_curv`. It begins as
    the `past` given, empty by default: one that a policy has made of the data that a model was pretrained on.

    q is a function of the trainable parameters, or with `include` of those that it selects by name ("head", "*.bias")
    or by type of module, also where they are frozen (`requires_grad=False`) and train only later; without those that
    `exclude` selects. What was ever in q stays in it, also for experiences that end while it is frozen. Parameters that
    train and were not in it because they were frozen are warned of before their first step.

    Raises TypeError or ValueError for unusable options when it is made; before the first step of an experience for
    whatever would keep it from being absorbed at its end, which is tried on four of its examples: a criterion without
    per-example form, a strategy that trains another loss than its criterion, an empty experience, several tasks in one
    experience of a multi-task model, a model without trainable parameters or without those of `past`, or that cannot be
    copied, selectors that fit no parameter, or (MemoryError) a matrix over its structure's limit;
    NonFiniteCurvatureError at the end of an experience that diverged: `past` then still holds what came before.
    """

    strength = Setting(partial(check_number, at_least=0, hint="0 only measures."))
    guard = Setting[Guard | None](check_guard)
    batch_size = Setting(check_count)
    examples_per_experience = Setting(partial(check_count, hint="As many weigh as much as one experience."))
    past = Setting[Past](partial(check_kind, kind=Past, example="Past()"))
    curvature = Fixed[Curvature](partial(check_kind, kind=Curvature, example="Fisher()"))
    structure = Fixed[Structure](partial(check_kind, kind=Structure, example="Diagonal()"))
    policy = Fixed[Policy](partial(check_kind, kind=Policy, example="Accumulate()"))
    selection = Fixed[Selection]()
    include, exclude = Forwarded("selection"), Forwarded("selection")

    def __init__(
        self,
        strength: float,
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
        self.strength, self.guard, self.batch_size = strength, guard, batch_size
        self.examples_per_experience = examples_per_experience
        self.curvature, self.structure, self.policy = curvature, structure, policy
        _check_curvature(curvature, structure)
        self.past, self.selection = past, selection_of(include, exclude)
        policy.check_past(past)
        self._unprotected = _bridge.Unprotected()
        self._task_ends = _bridge.TaskEnds()
        self._weight = self.strength
        self._penalty: torch.Tensor | None = None
        self._guarded: Guarded | None = None  # made from `guard` and `past` when it is needed
        self._weighted: Penalty | None = None  # made from `past`
        self._effect, self._classes = StepEffect(), EarlierClasses()
        self._said: set[str] = set()  # of what does nothing, once each
        self._updates = 0  # of the current task, of which an online stream gives one part after another
        self._in_parts = False  # since a stream was met that hides where its tasks end

    @property
    def weight(self) -> float:
        """The strength of the last step, which is lower than `strength` where the guard says so."""
        return self._weight

    @property
    def penalty(self) -> torch.Tensor | None:
        """q(θ) at the last step, without strength; None before there is a past."""
        return self._penalty

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        if self.strength > 0:
            _bridge.check_backward(strategy)

    def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        _bridge.check_experience(strategy)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self.strength:
            check_takes_dense_gradients(strategy.optimizer)
        self.policy.check_past(self.past)
        if not (self._in_parts or _bridge.tells_tasks(strategy)):
            self._begin_parts(strategy)
        _bridge.preflight(strategy, self._try, self.selection, _bridge.told_data)
        self._classes.begin(_bridge.classes_of(strategy))
        if self.past.model is not None:
            self._follow(self.past.model, strategy.model)
        if self._updates == 0:
            self._revise(strategy)

    def _begin_parts(self, strategy: Any) -> None:
        self.policy.check_parts(self.structure, _bridge.updates_of(strategy))
        self._in_parts = True
        LOG.info(
            "This online stream hides where its tasks end. Its parts are absorbed one by one and weigh by their "
            "examples, %d of them as much as one experience (examples_per_experience).", self.examples_per_experience
        )

    def _try(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep an experience from being absorbed, as seen on a few of its examples."""
        self.curvature.check_loss(risk.loss)
        space = risk.space if self.past.model is None else risk.space.union(self.past.model.space)
        self.structure.check(space, risk.anchor.element_size())
        if not self.past.experiences:
            estimate(self.curvature, self.structure, risk)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        past = self.past.model
        if past is None:
            self._weight, self._penalty = self.strength, None
            return
        self._unprotected.say(past.unprotected(strategy.model))
        if self._guarded is None or self._guarded.past is not past or self._guarded.guard is not self.guard:
            self._guarded = Guarded(self.guard, past)
        self._weight = self._guarded.allowed(self.strength, strategy.optimizer, strategy.model)
        if self._weight == 0:
            self._penalty = past(strategy.model)
            return
        if self._weighted is None or self._weighted.of is not past:
            check_takes_dense_gradients(strategy.optimizer)
            self._weighted = Penalty(past, self._weight)
        self._weighted.strength = self._weight
        weighted = self._weighted(strategy.model)
        self._penalty = weighted.detach() / self._weight
        strategy.loss = strategy.loss + weighted

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.past.model is not None and self._weight > 0:
            self._effect.look(strategy.optimizer, strategy.model, self.past.model, self._weight)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self._updates += 1
        self._revise(strategy)

    def _revise(self, strategy: Any) -> None:
        if not self.policy.revises:
            return
        with _bridge.untouched_randomness(), self._naming_the_experience(strategy):
            revised = self.policy.revise(
                self.past, unwrapped(strategy.model), self._updates, self.curvature, self.structure
            )
        for event in revised.refreshes[len(self.past.refreshes) :]:
            LOG.info("Refresh in experience %d after %d updates: %s", event.experience, event.iteration, event.reason)
        self.past = revised

    def state_dict(self) -> State:
        """What the plugin knows between two experiences, as tensors, numbers, strings, tuples and dictionaries, for
        `torch.save`: the past, and how far an online stream is in its task. Options are not in it.

        Raises TypeError for a past that is not made of these (see `Past.state_dict`).
        """
        decided = None if self._guarded is None else self._guarded.state_dict()
        return state_of(
            type(self).__name__, past=self.past.state_dict(), updates=self._updates, guarded=decided,
            task_ends=self._task_ends.state_dict(),
        )

    def load_state_dict(self, state: State, *, model: nn.Module | None = None, criterion: object = None) -> None:
        """Takes over what `state_dict` returned, as by `torch.load(path, weights_only=True)`, of a plugin with the same
        options: with the model loaded too, training goes on to the bit as it would have, under SGD without momentum.
        Avalanche clears what other optimizers know when a new strategy begins; there use `save_checkpoint`.

        `model` and `criterion` are needed where the past holds stored examples, and as in `Past.load_state_dict`.
        Raises ValueError for any other state, with what came, and for a past that the policy cannot go on from; the
        plugin is then as it was.
        """
        parts = check_state(state, type(self).__name__, "past", "updates", "guarded", "task_ends")["fields"]
        past = Past.load_state_dict(parts["past"], model=model, criterion=criterion)
        self.policy.check_past(past)
        self._task_ends.load_state_dict(parts["task_ends"])
        self.past, self._updates, self._guarded, self._weighted = past, parts["updates"], None, None
        if parts["guarded"] is not None and past.model is not None:
            self._guarded = Guarded(self.guard, past.model)
            self._guarded.load_state_dict(parts["guarded"])

    def __getstate__(self) -> dict[str, Any]:
        """With what the guard has decided, which a schedule of learning rates would not decide again."""
        return {**self.__dict__, "_weighted": None}

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._classes.end()
        whole = _bridge.tells_tasks(strategy)
        if whole and not self._task_ends.here(strategy):
            return
        with self._naming_the_experience(strategy):
            risk = _bridge.current_risk(strategy, self.batch_size, selection=self.selection, data=_bridge.told_data)
            if whole:
                self.past = self.policy.absorb(self.past, risk, self.curvature, self.structure)
            else:
                share = risk.examples / self.examples_per_experience
                self.past = self.policy.absorb_part(self.past, risk, self.curvature, self.structure, share)
        self._updates, self._weighted = 0, None
        self._guarded = self._guarded.renewed(self.past.model) if self._guarded and not whole else None
        if (largest := self._effect.negligible()) is not None:
            number, next_ones = _bridge.current_number(strategy), self._suggested(strategy)
            self._say_once("step", idle(number, self._weight, largest, next_ones))

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        self._classes.restart()

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if (found := _bridge.predicted(strategy)) is not None:
            self._classes.see(*found)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        speaking = (p for p in strategy.plugins if isinstance(p, CurvatureEWCPlugin) and p.strength > 0)
        if next(speaking, None) is self and (kept := self._classes.kept).nothing:
            self._say_once(
                "accuracy", kept.in_words(self.strength, bool(self.past.stored), self._suggested(strategy))
            )

    def _follow(self, past: QuadraticModel, model: nn.Module) -> None:
        """Takes the past where the model is, which may have been moved to another device or floating point type. Raises
        ValueError where the model lacks a parameter of the past."""
        moved = past.following(model)
        if moved is not past:
            self.past = replace(self.past, model=moved)

    def _suggested(self, strategy: Any) -> StrengthSuggestion:
        return suggest_strength(self.past, strategy.optimizer, strategy.model)

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, UserWarning, stacklevel=3)

    @contextmanager
    def _naming_the_experience(self, strategy: Any) -> Iterator[None]:
        try:
            yield
        except NonFiniteCurvatureError as error:
            further = "" if self.past.model is None or not self._weight else f" {self._suggested(strategy)}"
            raise NonFiniteCurvatureError(
                f"Experience {_bridge.current_number(strategy)}: {error} "
                f"The model of the {self.past.experiences} experiences before it is kept in `past`.{further}"
            ) from error


def _check_curvature(curvature: Curvature, structure: Structure) -> None:
    check_pair(curvature, structure)
    if not (curvature.is_semidefinite or curvature.is_mended):
        warnings.warn(
            f"{curvature} may be indefinite, and a penalty with it may reward leaving the anchor without bound. Use "
            "Hessian(psd=Clip()) or Hessian(psd=Absolute()) unless that is what you study; say is_semidefinite = True "
            "of a kind of your own that is not.",
            stacklevel=4,
        )
