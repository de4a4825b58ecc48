"""A trust region for the quadratic model of past loss: when it is estimated anew."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.options import check_count, check_fraction, check_seed, check_whole, optional, settle
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.damping import Damping, StepBound
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.looks import Look, RandomPart
from avalanche_curv.core.quadratic.model import QuadraticModel, half
from avalanche_curv.core.quadratic.policies import (
    Past,
    Policy,
    RefreshEvent,
    absorbing,
    check_stored,
    part_of,
    part_seed,
)
from avalanche_curv.core.quadratic.trust import RelativeError, Trust, TrustCheck
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk, frozen_together
from avalanche_curv.core.risk.frozen import keep_what_trains
from avalanche_curv.core.risk.selection import in_words
from avalanche_curv.core.structures.base import Structure


@dataclass(frozen=True)
class AdaptivePast(Past):
    """What `AdaptiveRefresh` knows of past experiences besides their model and stored examples.

    `loss` is L(a), that of the stored examples at the anchor, and `losses` are those of each example, by experience;
    `damping` is the part τI of the curvature that only keeps the model bounded below, and `refreshes` say when and why
    the model was estimated anew during an experience.
    """

    loss: float = 0.0
    damping: float = 0.0
    refreshes: tuple[RefreshEvent, ...] = ()
    losses: tuple[Float[Tensor, "n"], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, past: Past) -> AdaptivePast:
        """`past` itself where it is an `AdaptivePast`; otherwise one of its model, stored examples and number of
        experiences, with a loss and damping of 0 and no refreshes."""
        return past if isinstance(past, cls) else cls(past.model, past.stored, past.experiences)


@dataclass(frozen=True)
class AdaptiveRefresh(Policy):
    """Stores a random part of each experience's examples and keeps the quadratic model of their loss within its region.

    With L(θ) = Σ_t L_t(θ) the loss of the stored examples, the mean over each past experience, the model is its
    expansion at the newest anchor a,

        q(θ) = L(a) + gᵀδ + ½ δᵀ C δ,   δ = θ − a,   g = ∇L(a),   C = Σ_t C_t(a).

    Every `every` iterations L(θ) is measured, on as many stored examples as `look` takes. Where it leaves the region in
    which `trust` believes q, the anchor moves to θ and g and C are estimated anew, at most `max_refreshes` times an
    experience; at the end of each experience always. Before the first iteration L is that of the model as it has grown:
    where new outputs or unmasked units change it beyond `trust`, the model is estimated anew too, and so it is where
    parameters train that were frozen before. Each refresh and its reason are in `AdaptivePast.refreshes`. The penalty
    is q − L(a) + ½ τ ‖δ‖², with τ from `damping`: it stays bounded below where g leaves the range of C.

    `fraction` of an experience's examples are kept, drawn by `seed`. The idea of a region in which a quadratic model is
    trusted is that of Levenberg (1944) and of Conn et al. (2000).
    """

    trust: Trust = RelativeError(0.1)  # noqa: RUF009  a frozen value
    every: int = 5
    max_refreshes: int | None = None
    damping: Damping = StepBound()  # noqa: RUF009  a frozen value
    look: Look = RandomPart()  # noqa: RUF009  a frozen value
    fraction: float = 0.1
    seed: int = 0

    revises = True

    def __post_init__(self) -> None:
        settle(self, fraction=check_fraction, seed=check_seed, every=check_count, max_refreshes=optional(check_whole))
        for name, value, expected, example in (
            ("trust", self.trust, Trust, "RelativeError(0.1), AbsoluteError(0.1) or RatioBand(0.5, 2.0)"),
            ("look", self.look, Look, "RandomPart(256) or AllStored()"),
            ("damping", self.damping, Damping, "StepBound(10.0) or Tikhonov(0.0)"),
        ):
            if not isinstance(value, expected):
                raise TypeError(f"AdaptiveRefresh({name}=...) takes {example}; got {value!r}.")

    @absorbing
    @in_own_precision
    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> AdaptivePast:
        self.check_past(past)
        risk = past.widened(risk)
        newest = part_of(risk, self.fraction, self.seed, past.experiences)
        stored = (*(old.at(risk) for old in past.stored), newest)
        refreshed = self._refreshed(AdaptivePast.of(past), stored, curvature, structure)
        return replace(refreshed, experiences=past.experiences + 1)

    def check_past(self, past: Past) -> None:
        """Raises ValueError where the examples of an experience are not stored."""
        check_stored("AdaptiveRefresh()", past)

    @in_own_precision
    def revise(self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure) -> Past:
        if past.model is None or iteration % self.every or self._left(past) <= 0:
            return past
        keep_what_trains(model)
        begun, unchanged, past = past.model.unprotected(model), past, AdaptivePast.of(past)
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
        refreshed = self._refreshed(past, stored, curvature, structure)
        return replace(refreshed, refreshes=(*past.refreshes, event))

    def _looked(
        self, past: AdaptivePast, model: nn.Module, iteration: int, begun: Collection[str]
    ) -> tuple[TrustCheck, float, tuple[EmpiricalRisk, ...]]:
        """The loss of stored examples against its model; that loss on their frozen past functions; and, where these
        may have grown, the stored examples at the model as it is, whose loss is then the actual one."""
        predicted = predicted_loss(past, model)
        if not begun and iteration and past.losses:
            seed = part_seed(part_seed(self.seed, past.experiences), iteration)
            losses = partial(_losses, past.stored, [risk.space.tensors(model) for risk in past.stored])
            check = self.look.check(past.loss, predicted, past.losses, losses, self.trust, seed)
            return check, check.actual, ()
        grown = frozen_together(past.stored, model)
        actual = sum(risk.value() for risk in grown)
        # what trains now and was frozen may have changed in the frozen past functions, which share it
        frozen = actual if begun else memory_loss(past.stored, model)
        return TrustCheck(past.loss, actual, predicted), frozen, grown

    def _left(self, past: Past) -> float:
        """How many refreshes this experience may still have."""
        done = sum(event.experience == past.experiences for event in past.refreshes)
        return math.inf if self.max_refreshes is None else self.max_refreshes - done

    def _refreshed(
        self, past: AdaptivePast, stored: tuple[EmpiricalRisk, ...], curvature: Curvature, structure: Structure
    ) -> AdaptivePast:
        """The past with the model of the stored examples at the parameters where they are frozen."""
        models = [estimate(curvature, structure, risk, gradient=True) for risk in stored]
        total, losses = sum_at_one_anchor(models), tuple(risk.losses() for risk in stored)
        tau = self.damping.amount(total)
        return replace(
            past,
            model=total.damped(tau),
            loss=sum(float(each.double().mean()) for each in losses),
            losses=losses,
            damping=tau,
            stored=stored,
        )


@in_own_precision
def predicted_loss(past: Past, model: nn.Module) -> float:
    """q(θ) without its damping: the Taylor expansion of the loss of the stored examples; 0 without a past."""
    if past.model is None:
        return 0.0
    own, displacement = AdaptivePast.of(past), past.model.displacement(model)
    increase = past.model.increase(displacement) - half(own.damping * (displacement @ displacement))
    return own.loss + float(increase)


def _losses(
    stored: Sequence[EmpiricalRisk], parameters: Sequence[Sequence[Tensor]], t: int, indices: Tensor | None
) -> Float[Tensor, "n"]:
    """ℓ_n of those stored examples of experience t on their frozen past function at these parameters."""
    part = stored[t] if indices is None else stored[t].select(indices)
    with part.holding(parameters[t]):
        return part.losses()


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
