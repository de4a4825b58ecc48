"""The penalty of the past in any training loop: added to gradients before each step, or to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.attachment import Attachment, check_attachable, check_minimises, innermost, stepped_by
from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.options import Configured, Fixed, Forwarded, Setting, check_kind, check_number, in_short
from avalanche_curv.core.quadratic.attached import AttachedOptimizers, Calls
from avalanche_curv.core.quadratic.effect import StepEffect
from avalanche_curv.core.quadratic.kept import KeptPast
from avalanche_curv.core.quadratic.penalty import Penalty, check_takes_dense_gradients
from avalanche_curv.core.quadratic.policies import Accumulate, Past, Policy
from avalanche_curv.core.quadratic.stability import Guard, Guarded, WarnIfUnstable, check_guard
from avalanche_curv.core.quadratic.step_penalty import StepPenalty
from avalanche_curv.core.quadratic.strength import StrengthRule
from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import Forward
from avalanche_curv.core.risk.frozen import keep_what_trains, unwrapped
from avalanche_curv.core.risk.parameters import NamedParameters
from avalanche_curv.core.risk.selection import ParameterSelector, Selection, Unprotected, selection_of
from avalanche_curv.core.state import State, check_state, state_of
from avalanche_curv.core.structures import Diagonal, Structure


class CurvatureRegularizer(Configured):
    """Adds strength · q(θ) to what training minimises, with q the quadratic model of the loss on past tasks.

    With the defaults, q = Σ_t ½ Σ_i F_{t,i} (θ_i − a_{t,i})² over past tasks t, with F_t the exact diagonal Fisher of
    the mean loss at the anchor a_t (Kirkpatrick et al. 2017, eq. 3). The gradient is exact.

        regularizer = CurvatureRegularizer(100.0)
        for batches in tasks:
            optimizer = torch.optim.Adam(model.parameters())
            with regularizer.attach(optimizer, model):
                ...  # any training loop
            regularizer.absorb(model, criterion, batches)

    `attach` adds strength · ∇q to the gradients just before each step: once a step, however many backward passes it
    has; clipping has then seen the gradients of the task alone. `strength * q` as a term of the loss is
    `penalty(model)`, which clipping sees, and so does whatever else reads gradients; it is for use in place of
    `attach`, not beside it. Both train equal weights.

    `strength` is λ and means the same for every curvature and structure; 0 only measures, and trains exactly as without
    a regulariser. `guard` looks at each new model of the past under SGD: where lr · strength · λ_max(C) says that the
    penalty alone diverges, it warns (`WarnIfUnstable()`), lowers the strength for as long as that model is in use
    (`RescaleIfUnstable()`), or raises (`StopIfUnstable()`); None does not look. It looks at the rate of each parameter
    group, again where a rate or the strength changes.

    `strength`, `guard` and `past` may be set at any time and act from the next step on, so that the strength may follow
    a schedule; `weight` is the strength of the last step, as the guard allowed it, and `last_penalty` q(θ) there.
    Given as a rule, such as `Evidence()`, the strength begins at `rule.first`, and each task that was trained with a
    past sets it for the next one, which is logged.
    Others of the arguments cannot be changed. `past` holds the quadratic model, what the policy stores and, of
    `AdaptiveRefresh`, every refresh with its reason, which are also logged to the logger `avalanche_curv`. It begins as
    the `past` given, empty by default: one that a policy has made of the data that a model was pretrained on.

    q is a function of the trainable parameters, or with `include` of those that it selects by name ("head", "*.bias")
    or by type of module, also where they are frozen (`requires_grad=False`) and train only later; without those that
    `exclude` selects. What was ever in q stays in it, also for tasks that end while it is frozen. Parameters that
    train and were not in it because they were frozen are warned of before their first step. It warns once, with what
    to try next, after a task where its part was below 1e-2 of every step that was looked at (8, 16, 32, ...), as C
    measures both: see `suggest_strength`.

    Raises TypeError or ValueError for unusable options when it is made.
    """

    strength = Setting(partial(check_number, at_least=0, hint="0 only measures; Evidence() is for when it is made."))
    guard = Setting[Guard | None](check_guard)
    past, rule = Forwarded("_kept"), Forwarded("_kept")
    curvature, structure, policy = Forwarded("_kept"), Forwarded("_kept"), Forwarded("_kept")
    selection = Fixed[Selection]()
    include, exclude = Forwarded("selection"), Forwarded("selection")

    def __init__(
        self,
        strength: float | StrengthRule,
        *,
        curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
        structure: Structure = Diagonal(),  # noqa: B008
        policy: Policy = Accumulate(),  # noqa: B008
        guard: Guard | None = WarnIfUnstable(),  # noqa: B008
        past: Past = Past(),  # noqa: B008
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        rule = strength if isinstance(strength, StrengthRule) else None
        self.strength = strength if rule is None else rule.first
        self.guard = guard
        self._kept = KeptPast(past, curvature, structure, policy, rule)
        self.selection = selection_of(include, exclude)
        self._updates = 0  # of the current task
        self._penalty, self._attached = StepPenalty(self.strength), AttachedOptimizers()
        self._unprotected, self._effect = Unprotected(), StepEffect()
        self._restart()

    def described(self) -> Iterable[str]:
        return with_rule(super().described(), self.rule, self.strength)

    def _restart(self) -> None:
        """Before the first step of a task."""
        self._begun = False
        self._named: NamedParameters | None = None
        self._attached.restart()

    @property
    def weight(self) -> float:
        """The strength of the last step, which is lower than `strength` where the guard says so."""
        return self._penalty.weight

    @property
    def last_penalty(self) -> Tensor | None:
        """q(θ) at the last step, without strength; None before there is a past. Where this is attached it is computed
        when it is asked for."""
        return self._penalty.last

    def attach(self, optimizer: Optimizer, model: nn.Module) -> Attachment:
        """Adds strength · ∇q to the gradients before each `optimizer.step()` from now on, until `remove()` of what is
        returned, which is a context manager too.

        - Gradient accumulation: it is added once a step.
        - Clipping, as by `clip_grad_norm_`, happens before the step and sees the gradients of the task alone: what is
          added is not clipped. For a penalty that is clipped too, add `penalty(model)` to the loss instead.
        - `torch.amp.GradScaler`: gradients are unscaled by then, or, for fused optimisers, what is added is scaled as
          they are. Steps that it skips add nothing.
        - A closure: q is added to the gradients and to the loss of each of its evaluations, as LBFGS needs.
        - Several optimisers of one model are each attached. Where they step after one backward pass, q is evaluated
          once, before the first of them steps, and each adds the part of its own parameters. Attached again to an
          optimiser of the same parameters, as to a new one for each task, it leaves the old one.
        - DistributedDataParallel: it is added after gradients were averaged, and equal on every rank.
        - `torch.compile`: a compiled model stays one graph, and so does what a compiled `optimizer.step` does to the
          parameters, between this and what follows the step.
        - Other devices: from the second step of a task on none waits for them, but for the look at updates 8, 16, 32,
          ..., at what the penalty does, for `AdaptiveRefresh`, and for a scaler's verdict where the optimiser is fused.

        A parameter without a gradient gets that of the penalty; a step where no parameter has one is left alone, and so
        are parameters that no optimiser steps. `policy.revise` is called after each step.

        Raises TypeError for what is no optimiser and model, and for SparseAdam; ValueError where the optimiser steps
        nothing of the model or maximises, and where the model lacks a parameter of the past; RuntimeError where this
        is attached for another model.
        """
        optimizer = innermost(optimizer)
        check_attachable(optimizer, model)
        check_minimises(self, optimizer)
        if stepped_by(optimizer).isdisjoint(map(id, model.parameters())):
            raise ValueError(
                f"The {type(optimizer).__name__} steps no parameter of {type(model).__name__}. Give the optimiser of "
                "this model."
            )
        self._check(optimizer)
        if self.past.model is not None:
            self.past.model.space.tensors(model)
        calls = Calls(self._start, self._ready, self.look, self.revise)
        attachment = self._attached.attach(self, optimizer, model, calls)
        self._begun = False
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Called when an attachment is removed."""
        self._attached.detach(attachment)

    def penalty(self, model: nn.Module, *optimizers: Optimizer) -> Tensor:
        """strength · q(θ) as a scalar to be added to the loss, with its exact gradient; zero without a past and at
        strength 0. Call `revise(model)` after each step where the policy is `AdaptiveRefresh`.

        `optimizers` are those of the step, for the guard, which does not look without them. Raises RuntimeError where
        this is attached, since the penalty would count twice, and what the guard raises.
        """
        if torch.is_grad_enabled():
            self._check_alone()
        self._start(model, *optimizers)
        penalty = self._ready(model, *optimizers)
        return next(model.parameters()).new_zeros(()) if penalty is None else penalty(model)

    def add(self, model: nn.Module, *optimizers: Optimizer) -> Tensor | float | None:
        """Adds strength · ∇q(θ) to the gradients of `model`, after its backward pass, and returns strength · q(θ) as a
        detached scalar or a number; None, with nothing done, without a past and at strength 0.

        It is for use in place of `penalty(model)` as a term of the loss, which takes two more passes over the
        parameters and trains equal weights, to rounding for low rank and for Kronecker products. What scales the loss,
        and hooks on gradients, do not see it. `optimizers` and errors are as there; a missing gradient counts as zero.
        """
        self._check_alone()
        self._start(model, *optimizers)
        penalty = self._ready(model, *optimizers)
        if penalty is None:
            return None
        if self._named is None or self._named.model is not model:
            self._named = NamedParameters(model)
        named = self._named()
        return penalty.weighted(penalty.add(named, {name: p for name, p in named.items() if p.requires_grad}))

    def _check_alone(self) -> None:
        if self._attached.attachments:
            raise RuntimeError(
                "This CurvatureRegularizer is attached and adds its gradient before each step: as a term of the loss "
                "it would count twice. Leave the term out, or call remove() on what attach() returned."
            )

    def check(self, model: nn.Module, criterion: object, batches: Any, **options: Any) -> None:
        """Raises what would keep a task from being absorbed at its end, as seen on a few of its examples: before it is
        trained. The arguments are those of `absorb`."""
        with untouched_randomness():
            self.check_risk(self._risk(model, criterion, batches, options).trial())

    def check_risk(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep the examples of `risk` from being absorbed, by doing it with the few that it holds."""
        self._kept.check_risk(risk)

    def absorb(self, model: nn.Module, criterion: object, batches: Any, **options: Any) -> None:
        """Takes in a task at its end: `past` then holds its loss too, as `criterion` gives it for `batches` of (inputs,
        targets) at the parameters that `model` has now. Further `options` are those of `EmpiricalRisk.snapshot`.

        Model, gradients and random states stay as they are. Raises what `snapshot` raises, and NonFiniteCurvatureError
        after training that diverged: `past` is then as before.
        """
        with untouched_randomness():
            self.absorb_risk(self._risk(model, criterion, batches, options))

    def absorb_part(
        self, model: nn.Module, criterion: object, batches: Any, *, share: float, **options: Any
    ) -> None:
        """Takes in one part of a stream that does not tell where its tasks end, as `share` > 0 of a task: its number
        of examples over that which a task is taken to have. Raises TypeError for policies that store examples, which
        take whole tasks only, and what `absorb` raises."""
        share = check_number("share", share, above=0, hint="It is a number of examples over that of a task.")
        self.check_parts(max(2, self._updates))
        with untouched_randomness():
            self.absorb_risk(self._risk(model, criterion, batches, options), share)

    def check_parts(self, updates: int) -> None:
        """Raises TypeError or ValueError where parts of a task of so many updates each cannot be absorbed."""
        self._kept.check_parts(updates)

    def absorb_risk(
        self, risk: EmpiricalRisk, share: float | None = None, number: int | None = None, policy: Policy | None = None,
        examples: int | None = None,
    ) -> None:
        """Takes in the loss of a task that is frozen at its end, or of a part of one that is the `share` of a task.
        `number` is what warnings call the task, by default how many were absorbed before; `policy` the one that takes
        it in where not this regulariser's: for examples that were drawn before from so many `examples`,
        `Drawing.of_all()` of it."""
        number = self.past.experiences if number is None else number
        self._penalty.release()
        with self._keeping_the_past():
            self.strength = self._kept.absorb(risk, self.strength, share, policy, examples)
        guarded, model = self._penalty.guarded, self.past.model
        self._penalty.restart(None if guarded is None or model is None or share is None else guarded.renewed(model))
        self._updates = 0
        self._restart()
        self._effect.warn(number, self.weight, self.past)

    def begin(self, model: nn.Module, *optimizers: Optimizer) -> None:
        """Before the first step on new data: takes the past where the model is, which may have been moved to another
        device or floating point type, and lets the policy revise it for a model that has grown. Called by itself with
        the first step, or first `penalty`, of a task.

        Raises TypeError for SparseAdam, for what is no model and for a past of another structure, ValueError for one
        that the policy cannot go on from or whose parameters the model lacks, and for a selector that fits none.
        """
        check_kind("model", model, nn.Module, "the model that is trained")
        self.selection.check(unwrapped(model))
        keep_what_trains(model)
        self._check(*optimizers)
        self._effect.see(model, *optimizers)
        self._kept.follow(model)
        if self._updates == 0:
            self._revise(model)
        self._begun = True

    def _start(self, model: nn.Module, *optimizers: Optimizer) -> None:
        """Before a step: begins where none was made of this task."""
        if not self._begun:
            self.begin(model, *optimizers)

    def revise(self, model: nn.Module) -> None:
        """After each step: counts it, and lets the policy revise the past. Called by itself where this is attached."""
        self._updates += 1
        self._revise(model)

    def look(self, optimizer: Optimizer, model: nn.Module, scale: float | Tensor = 1.0) -> None:
        """Looks at the part of the penalty in the next step, when all gradients are there: `scale` times what they are.
        Called by itself where this is attached."""
        if self.past.model is not None and self.weight > 0:
            self._effect.look(optimizer, model, self.past.model, self.weight, scale)

    def state_dict(self) -> State:
        """What is known between two steps, as tensors, numbers, strings, tuples and dictionaries, for `torch.save`: the
        past, how many steps the current task has had, what the guard has decided, and the strength where a rule chose
        it. Options are not in it.

        Raises TypeError for a past that is not made of these (see `Past.state_dict`).
        """
        decided = None if self._penalty.guarded is None else self._penalty.guarded.state_dict()
        return state_of(
            type(self).__name__, past=self.past.state_dict(), updates=self._updates, guarded=decided,
            unfinished=self._attached.unfinished, **({} if self.rule is None else {"strength": self.strength}),
        )

    def load_state_dict(
        self, state: State, *, model: nn.Module | None = None, criterion: object = None, forward: Forward | None = None
    ) -> None:
        """Takes over what `state_dict` returned, as by `torch.load(path, weights_only=True)`, of a regulariser with the
        same options: with model and optimiser loaded too, training goes on to the bit as it would have.

        `model`, `criterion` and `forward` are needed where the past holds stored examples, and as in
        `Past.load_state_dict`.
        Raises ValueError for any other state, with what came, and for a past that the policy cannot go on from,
        TypeError for one of another structure; the regulariser is then as it was.
        """
        fields = "past", "updates", "unfinished", "guarded", *(() if self.rule is None else ("strength",))
        parts = check_state(state, type(self).__name__, *fields)["fields"]
        past = Past.load_state_dict(parts["past"], model=model, criterion=criterion, forward=forward)
        self._kept.check_past(past)
        self.past, self._updates, guarded = past, parts["updates"], None
        if parts["guarded"] is not None and past.model is not None:
            guarded = Guarded(self.guard, past.model)
            guarded.load_state_dict(parts["guarded"])
        self._penalty.restart(guarded)
        self._restart()
        self._attached.unfinished = parts["unfinished"]
        if self.rule is not None:
            self.strength = parts["strength"]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no model, and are attached to nothing."""
        return {**vars(self), "_named": None}

    def _check(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers if self.strength else ():
            check_takes_dense_gradients(optimizer)
        self._kept.check_past(self.past)

    def _risk(self, model: nn.Module, criterion: object, batches: Any, options: dict[str, Any]) -> EmpiricalRisk:
        for name in {"include", "exclude"} & options.keys():
            raise TypeError(f"Parameters are selected once: give {name}=[...] to the CurvatureRegularizer.")
        options = {**options, "include": self.selection.include, "exclude": self.selection.exclude}
        return EmpiricalRisk.snapshot(model, criterion, batches, **options)

    def _ready(self, model: nn.Module, *optimizers: Optimizer) -> Penalty | None:
        """The penalty of the next step; None where it adds nothing."""
        past = self.past.model
        self._effect.see(model, *optimizers)
        if past is not None and past.frozen:
            self._unprotected.say(past.unprotected(model))
        return self._penalty.next(past, self.strength, self.guard, model, *optimizers)

    def _revise(self, model: nn.Module) -> None:
        if self.policy.is_due(self.past, self._updates):
            with self._keeping_the_past():
                self._kept.revise(model, self._updates)

    @contextmanager
    def _keeping_the_past(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteCurvatureError as error:
            tried = self.past.model is not None and self.weight and self._effect.knows_optimizers
            further = f" {self._effect.suggestion(self.past)}" if tried else ""
            raise NonFiniteCurvatureError(
                f"{error} The model of the {self.past.experiences} experiences before it is kept in `past`.{further}"
            ) from error


def with_rule(arguments: Iterable[str], rule: StrengthRule | None, strength: float) -> Iterable[str]:
    """The arguments of a `repr`, of which the strength is the first, with the rule that chooses it, and what it has
    chosen."""
    if rule is None:
        return arguments
    _, *others = arguments
    return [f"strength={in_short(rule)}{'' if strength == rule.first else f' at {strength:.4g}'}", *others]
