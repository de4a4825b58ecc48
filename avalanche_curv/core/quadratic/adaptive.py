"""A trust region for the quadratic model of past loss: when it is estimated anew."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.options import (
    check_count,
    check_fraction,
    check_kind,
    check_seed,
    check_whole,
    optional,
    settle,
)
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.damping import Damping, StepBound
from avalanche_curv.core.quadratic.estimate import estimate, estimate_with_losses, not_finite
from avalanche_curv.core.quadratic.looks import Look, RandomPart
from avalanche_curv.core.quadratic.model import QuadraticModel, half
from avalanche_curv.core.quadratic.policies import (
    Drawing,
    Past,
    RefreshEvent,
    absorbing,
    check_stored,
    part_seed,
)
from avalanche_curv.core.quadratic.renewals import Everything, Renewal
from avalanche_curv.core.quadratic.trust import RelativeError, Trust, TrustCheck
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import keep_what_trains
from avalanche_curv.core.risk.known import is_same
from avalanche_curv.core.risk.selection import in_words
from avalanche_curv.core.risk.several import frozen_together, joined_risk
from avalanche_curv.core.structures.base import Matrix, Structure, all_finite


@dataclass(frozen=True)
class AdaptivePast(Past):
    """What `AdaptiveRefresh` knows of past experiences besides their model and stored examples.

    `loss` is L(a), that of the stored examples at the anchor, and `losses` are those of each example, by experience;
    where the model is one of a part of them, `drawn` are their sorted places. `damping` is the part τI of the curvature
    that only keeps the model bounded below, and `kept` the curvature without it, where refreshes keep it. `refreshes`
    say when and why the model was estimated anew during an experience.
    """

    loss: float = 0.0
    damping: float = 0.0
    refreshes: tuple[RefreshEvent, ...] = ()
    losses: tuple[Float[Tensor, "n"], ...] = field(default=(), repr=False)
    drawn: tuple[Int[Tensor, "n"], ...] = field(default=(), repr=False)
    kept: Matrix | None = field(default=None, repr=False)

    @property
    def parts(self) -> tuple[EmpiricalRisk, ...]:
        """Those of the stored examples of which the model is one: of each experience all, or what is drawn."""
        drawn = self.drawn or tuple(torch.arange(risk.examples) for risk in self.stored)
        return tuple(risk if len(at) == risk.examples else risk.select(at) for risk, at in zip(self.stored, drawn))

    @classmethod
    def of(cls, past: Past) -> AdaptivePast:
        """`past` itself where it is an `AdaptivePast`; otherwise one of its model, stored examples and number of
        experiences, with a loss and damping of 0 and no refreshes."""
        return past if isinstance(past, cls) else cls(past.model, past.stored, past.experiences)


@dataclass(frozen=True)
class AdaptiveRefresh(Drawing):
    """Stores a random part of each experience's examples and keeps the quadratic model of their loss within its region.

    With L(θ) = Σ_t L_t(θ) the loss of the stored examples, the mean over each past experience, the model is its
    expansion at the newest anchor a,

        q(θ) = L(a) + gᵀδ + ½ δᵀ C δ,   δ = θ − a,   g = ∇L(a),   C = Σ_t C_t(a).

    Every `every` iterations L(θ) is measured, on as many stored examples as `look` takes. Where it leaves the region in
    which `trust` believes q, the anchor moves to θ and g and C are estimated anew, at most `max_refreshes` times an
    experience; at the end of each experience always, and then of all that is stored. `renew` says of how many examples
    a refresh is made, and whether it estimates C too or g alone: `Everything()` of all, or `SlopeAlone(512)`. L and q
    are then those of the examples that it has drawn. Before the first iteration L is that of the model as it has grown:
    where new outputs or unmasked units change it beyond `trust`, the model is estimated anew too, and so it is where
    parameters train that were frozen before. Each refresh and its reason are in `AdaptivePast.refreshes`. The penalty
    is q − L(a) + ½ τ ‖δ‖², with τ from `damping`: it stays bounded below where g leaves the range of C.

    `fraction` of an experience's examples are kept, drawn by `seed`.

    Take it where models of known error are wanted, or few and long-lived ones do (three refreshes a task on sine and
    digits, `run trust_region`); where training only has to be cheap and good, replay what is stored. A model that lives
    k steps costs c_penalty + c_look / `every` + c_refresh / k a step, replay one more batch. On class-incremental split
    MNIST k is 5 to 11 with any structure, and of so short a model the curvature matters little: there
    `AdaptiveRefresh(RelativeError(0.2), renew=SlopeAlone(512))` with `Diagonal()` and `Fisher(samples=1)` is the
    cheapest setting known. With 2,000 images and 100 steps a task it reaches 0.907 there (Replay 0.897), at 1.4 times
    Replay's processor time (`run trust_region --part frontier`). On one thread, in steps of a gradient of 128 images
    and Adam on a 784-400-400-10 network: penalty 0.2, look 1, gradient of 512 images 2 to 3, frozen copy 0.1.

    The idea of a region in which a quadratic model is trusted is that of Levenberg (1944) and of Conn et al. (2000).
    """

    trust: Trust = RelativeError(0.1)  # noqa: RUF009  a frozen value
    every: int = 5
    max_refreshes: int | None = None
    damping: Damping = StepBound()  # noqa: RUF009  a frozen value
    look: Look = RandomPart()  # noqa: RUF009  a frozen value
    renew: Renewal = Everything()  # noqa: RUF009  a frozen value
    fraction: float = 0.1
    seed: int = 0

    revises = True

    def __post_init__(self) -> None:
        settle(self, fraction=check_fraction, seed=check_seed, every=check_count, max_refreshes=optional(check_whole))
        trusts = "RelativeError(0.1), AbsoluteError(0.1) or RatioBand(0.5, 2.0)"
        settle(
            self, trust=partial(check_kind, kind=Trust, example=trusts),
            look=partial(check_kind, kind=Look, example="RandomPart(256) or AllStored()"),
            renew=partial(check_kind, kind=Renewal, example="Everything() or SlopeAlone(512)"),
            damping=partial(check_kind, kind=Damping, example="StepBound(10.0) or Tikhonov(0.0)"),
        )  # fmt: skip

    @absorbing
    @in_own_precision
    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> AdaptivePast:
        self.check_past(past)
        newest = self.drawn(past, risk)
        stored = (*(old.at(newest) for old in past.stored), newest)
        everything = tuple(torch.arange(risk.examples) for risk in stored)
        refreshed = self._refreshed(AdaptivePast.of(past), stored, everything, curvature, structure)
        return replace(refreshed, experiences=past.experiences + 1)

    def check_past(self, past: Past) -> None:
        """Raises ValueError where the examples of an experience are not stored."""
        check_stored("AdaptiveRefresh()", past)

    def is_due(self, past: Past, iteration: int) -> bool:
        return not iteration % self.every and past.model is not None and self._left(past) > 0

    @in_own_precision
    def revise(self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure) -> Past:
        if past.model is None or not self.is_due(past, iteration):
            return past
        keep_what_trains(model)
        quadratic, unchanged, past = past.model, past, AdaptivePast.of(past)
        begun = quadratic.unprotected(model)
        if not (iteration or begun) and past.losses and is_same(past.stored[0].model, model):
            return unchanged  # before the first step L(θ) = L(a), which is known
        check, frozen, grown = self._looked(past, model, iteration, begun)
        reason = self.trust.broken(check)
        if begun:
            reason = f"{in_words(begun)} train now and did not before"
        if reason is None:
            return unchanged
        if check.actual != frozen:
            reason = f"growth changed the loss from {frozen:.3g} to {check.actual:.3g}: {reason}"
        if self._left(past) == 1:
            reason = f"{reason}; the last of {self.max_refreshes}"
        event = RefreshEvent(past.experiences, iteration, reason, check.actual, check.predicted)
        stored = grown or frozen_together(past.stored, model)
        drawn = self.renew.drawn([risk.examples for risk in stored], self._seed(past, len(past.refreshes)))
        kept = past.kept if self.renew.keeps_curvature and not begun else None
        if kept is not None and stored[0].space == quadratic.space:
            refreshed = self._moved(past, stored, drawn, kept.to(stored[0].anchor))
        else:
            refreshed = self._refreshed(past, stored, drawn, curvature, structure)
        return replace(refreshed, refreshes=(*past.refreshes, event))

    def _seed(self, past: Past, number: int) -> int:
        """Of what is drawn during the current experience."""
        return part_seed(part_seed(self.seed, past.experiences), number)

    def _looked(
        self, past: AdaptivePast, model: nn.Module, iteration: int, begun: Collection[str]
    ) -> tuple[TrustCheck, float, tuple[EmpiricalRisk, ...]]:
        """The loss of stored examples against its model; that loss on their frozen past functions; and, where these
        may have grown, the stored examples at the model as it is, whose loss is then the actual one."""
        predicted = predicted_loss(past, model)
        if not begun and iteration and past.losses:
            losses = partial(_losses, past, past.stored[0].space.tensors(model))
            seed = self._seed(past, iteration)
            check = self.look.check(past.loss, predicted, past.losses, losses, self.trust, seed)
            return check, check.actual, ()
        grown = frozen_together(past.stored, model)
        actual = sum(risk.value() for risk in replace(past, stored=grown).parts)
        # what trains now and was frozen may have changed in the frozen past functions, which share it
        frozen = actual if begun else memory_loss(past.parts, model)
        return TrustCheck(past.loss, actual, predicted), frozen, grown

    def _left(self, past: Past) -> float:
        """How many refreshes this experience may still have."""
        done = sum(event.experience == past.experiences for event in past.refreshes)
        return math.inf if self.max_refreshes is None else self.max_refreshes - done

    def _refreshed(
        self, past: AdaptivePast, stored: tuple[EmpiricalRisk, ...], drawn: tuple[Int[Tensor, "n"], ...],
        curvature: Curvature, structure: Structure,
    ) -> AdaptivePast:  # fmt: skip
        """The past with the model of the drawn ones of the stored examples, at the parameters where these are frozen.
        """
        new, models, losses = replace(past, stored=stored, drawn=drawn), [], dict[int, Tensor]()
        for alike in _alike(new.parts):
            model, found = _of_experiences(curvature, structure, [*alike.values()])
            models.append(model)
            losses |= zip(alike, found)
        total = sum_at_one_anchor(models)
        kept = total.curvature if self.renew.keeps_curvature else None
        return self._damped(replace(new, kept=kept), total, losses)

    def _moved(
        self, past: AdaptivePast, stored: tuple[EmpiricalRisk, ...], drawn: tuple[Int[Tensor, "n"], ...], kept: Matrix
    ) -> AdaptivePast:
        """The past with the loss and slope of the drawn examples at the parameters where these are frozen, and the
        curvature that is kept. Raises NonFiniteCurvatureError for NaN or infinity in the slope."""
        new, losses = replace(past, stored=stored, drawn=drawn), dict[int, Tensor]()
        total = torch.zeros_like(stored[0].anchor)
        for alike in _alike(new.parts):
            found, slope = joined_risk([*alike.values()]).losses_and_gradient()
            losses |= zip(alike, found.chunk(len(alike)))
            total = total.add_(slope, alpha=len(alike))
        if not all_finite(total):
            raise not_finite("The slope", sum(map(len, drawn)))
        model = QuadraticModel(stored[0].space, stored[0].anchor, kept, total, frozen=stored[0].frozen)
        return self._damped(new, model, losses)

    def _damped(
        self, past: AdaptivePast, model: QuadraticModel, losses: Mapping[int, Float[Tensor, "n"]]
    ) -> AdaptivePast:
        """The past with this model, damped, and the losses at its anchor, by experience."""
        own, tau = tuple(losses[t] for t in range(len(past.stored))), self.damping.amount(model)
        loss = sum(float(part.double().mean()) for part in own)
        return replace(past, model=model.damped(tau), loss=loss, losses=own, damping=tau)


def _of_experiences(
    curvature: Curvature, structure: Structure, risks: list[EmpiricalRisk]
) -> tuple[QuadraticModel, Sequence[Float[Tensor, "n"]]]:
    """Σ_t of the models of T experiences with as many examples each, and the losses of these.

    Their slopes are T times the mean over all examples, and so are their curvatures where a structure is linear; what
    others make of a sum depends on its terms.
    """
    together, count = joined_risk(risks), len(risks)
    if count == 1 or (structure.is_linear and isinstance(curvature, OutputCurvature)):
        model, losses = estimate_with_losses(curvature, structure, together)
        return model.scaled(count), losses.chunk(count)
    losses, slope = together.losses_and_gradient()
    total = sum_at_one_anchor([estimate(curvature, structure, risk) for risk in risks])
    return replace(total, gradient=count * slope), losses.chunk(count)


def _alike(risks: Sequence[EmpiricalRisk]) -> list[dict[int, EmpiricalRisk]]:
    """Risks by their places, those together that have as many examples, the same loss and way to call the model."""
    groups: list[tuple[tuple, dict[int, EmpiricalRisk]]] = []
    for t, risk in enumerate(risks):
        kind = risk.examples, risk.form, risk.forward
        group = next((known for of, known in groups if of == kind), None)
        if group is None:
            groups.append((kind, group := {}))
        group[t] = risk
    return [group for _, group in groups]


@in_own_precision
def predicted_loss(past: Past, model: nn.Module) -> float:
    """q(θ) without its damping: the Taylor expansion of the loss of the stored examples; 0 without a past."""
    if past.model is None:
        return 0.0
    own, displacement = AdaptivePast.of(past), past.model.displacement(model)
    increase = past.model.increase(displacement) - half(own.damping * (displacement @ displacement))
    return own.loss + float(increase)


def _losses(
    past: AdaptivePast, parameters: Sequence[Tensor], indices: Sequence[Int[Tensor, "m"]]
) -> list[Float[Tensor, "m"]]:
    """ℓ_n of those drawn examples of each experience on their frozen past function at these parameters."""
    found = {t: old.new_zeros(0) for t, old in enumerate(past.losses)}
    chosen = {t: past.stored[t].select(past.drawn[t][at]) for t, at in enumerate(indices) if len(at)}
    for alike in _alike([*chosen.values()]):
        together = joined_risk([*alike.values()])
        with together.holding(parameters):
            losses = together.losses().chunk(len(alike))
        found |= {[*chosen][place]: own for place, own in zip(alike, losses)}
    return [*found.values()]


def memory_loss(stored: tuple[EmpiricalRisk, ...], model: nn.Module) -> float:
    """L = Σ_t L_t of stored examples at the parameters of `model`, on their frozen past functions."""
    return sum(risk.value_at(risk.space.vector(model)) for risk in stored)


def sum_at_one_anchor(models: list[QuadraticModel]) -> QuadraticModel:
    """The sum of models of one space and anchor. Unlike their `+`, which keeps the minimum, it keeps the slope where a
    structure cuts the sum of curvatures."""
    first, *others = models
    matrix, slope = first.curvature, first.gradient
    for model in others:
        matrix = matrix.plus(model.curvature)
        slope = slope + model.gradient if slope is not None and model.gradient is not None else None
    return replace(first, curvature=matrix.compressed(), gradient=slope)
