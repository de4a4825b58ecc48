"""A trust region for the quadratic model of past loss: where it is trusted, how it stays bounded, when it is estimated
anew."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.options import (
    check_count,
    check_fraction,
    check_number,
    check_seed,
    check_whole,
    optional,
    settle,
)
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.model import QuadraticModel, half
from avalanche_curv.core.quadratic.policies import Past, Policy, RefreshEvent, absorbing, check_stored, part_of
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk, frozen_together
from avalanche_curv.core.risk.frozen import keep_what_trains
from avalanche_curv.core.risk.selection import in_words
from avalanche_curv.core.structures.base import Structure


@dataclass(frozen=True)
class TrustCheck:
    """The loss L of stored examples against its quadratic model q, at the anchor a and at the current parameters θ.

    `start` = L(a) = q(a), `actual` = L(θ), `predicted` = q(θ).

    >>> check = TrustCheck(start=1.0, actual=2.0, predicted=1.5)
    >>> check.error, check.ratio
    (0.5, 2.0)
    """

    start: float
    actual: float
    predicted: float

    @property
    def error(self) -> float:
        """|L(θ) − q(θ)|."""
        return abs(self.actual - self.predicted)

    @property
    def ratio(self) -> float:
        """ρ = (L(θ) − L(a)) / (q(θ) − q(a)), NaN where nothing is predicted."""
        change = self.predicted - self.start
        return (self.actual - self.start) / change if change else float("nan")


class Trust(ABC):
    """The region in which a quadratic model is trusted."""

    @abstractmethod
    def broken(self, check: TrustCheck) -> str | None:
        """Why the model is not trusted at these parameters, with its numbers; None where it is."""


check_tolerance = partial(check_number, above=0, hint="Smaller refreshes more often; infinity is Refresh().")


@dataclass(frozen=True)
class AbsoluteError(Trust):
    """|L(θ) − q(θ)| ≤ tolerance, in units of the loss summed over past experiences."""

    tolerance: float

    def __post_init__(self) -> None:
        settle(self, tolerance=check_tolerance)

    def broken(self, check: TrustCheck) -> str | None:
        if check.error <= self.tolerance:
            return None
        return f"error {check.error:.3g} above the tolerance {self.tolerance:g}"


@dataclass(frozen=True)
class RelativeError(Trust):
    """|L(θ) − q(θ)| ≤ tolerance · max(L(θ), L(a)): a share of the loss of the stored examples."""

    tolerance: float

    def __post_init__(self) -> None:
        settle(self, tolerance=check_tolerance)

    def broken(self, check: TrustCheck) -> str | None:
        loss = max(check.actual, check.start)
        if check.error <= self.tolerance * loss:
            return None
        return f"error {check.error:.3g} above {self.tolerance:g} times the loss {loss:.3g}"


@dataclass(frozen=True)
class RatioBand(Trust):
    """low ≤ ρ ≤ high for the ratio ρ of the actual to the predicted change (Conn et al. 2000, section 6.1).

    Changes that are both below `floor` · L(a) are not judged: their ratio is noise.
    """

    low: float = 0.5
    high: float = 2.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        settle(self, low=check_number, high=check_number)
        if not self.low < 1 < self.high:
            raise ValueError(
                f"RatioBand needs low < 1 < high; got low={self.low!r}, high={self.high!r}. 1 is a perfect prediction; "
                "RatioBand(0.5, 2.0) allows a factor of two either way."
            )
        settle(self, floor=partial(check_number, at_least=0, hint="0 judges every change."))

    def broken(self, check: TrustCheck) -> str | None:
        actual, predicted = check.actual - check.start, check.predicted - check.start
        if max(abs(actual), abs(predicted)) <= self.floor * check.start or self.low <= check.ratio <= self.high:
            return None
        return f"ratio {check.ratio:.3g} of actual to predicted change outside [{self.low:g}, {self.high:g}]"


class Damping(ABC):
    """How much of τ ‖δ‖² / 2 a quadratic model with the slope g gets.

    With positive semi-definite C and τ > 0 the model q + ½ τ ‖δ‖² is bounded below, also where g leaves the range of C.
    """

    @abstractmethod
    def amount(self, model: QuadraticModel) -> float:
        """τ ≥ 0 for a quadratic model with its slope g and anchor a."""


def damped(model: QuadraticModel, tau: float) -> QuadraticModel:
    """The quadratic model q + ½ τ ‖δ‖² with the same anchor; q itself for τ = 0."""
    return replace(model, curvature=model.curvature.damped(tau)) if tau else model


@dataclass(frozen=True)
class Tikhonov(Damping):
    """A fixed τ ≥ 0, in units of curvature."""

    tau: float

    def __post_init__(self) -> None:
        settle(self, tau=partial(check_number, at_least=0, hint="0 leaves q as it is."))

    def amount(self, model: QuadraticModel) -> float:
        return self.tau


@dataclass(frozen=True)
class StepBound(Damping):
    """τ = ‖g‖ / (radius · ‖a‖): the minimum of q then lies within `radius` times the length of its anchor a.

    For ‖(C + τI)⁻¹ g‖ ≤ ‖g‖ / τ = radius · ‖a‖ whatever the positive semi-definite C. At a minimum of past loss, where
    g = 0, nothing is added.
    """

    radius: float = 10.0

    def __post_init__(self) -> None:
        hint = "It counts in lengths of the anchor: 10 keeps the minimum of q within ten times the norm of parameters."
        settle(self, radius=partial(check_number, above=0, hint=hint))

    def amount(self, model: QuadraticModel) -> float:
        if model.gradient is None:
            return 0.0
        length = float(model.anchor.norm()) or 1.0  # all parameters zero: the radius counts in their own units
        return float(model.gradient.norm()) / (self.radius * length)


@dataclass(frozen=True)
class AdaptivePast(Past):
    """What `AdaptiveRefresh` knows of past experiences besides their model and stored examples.

    `loss` is L(a), that of the stored examples at the anchor, `damping` the part τI of the curvature that only keeps
    the model bounded below, and `refreshes` say when and why the model was estimated anew during an experience.
    """

    loss: float = 0.0
    damping: float = 0.0
    refreshes: tuple[RefreshEvent, ...] = ()

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

    Every `every` iterations L(θ) is measured, one forward pass over the stored examples. Where it leaves the region in
    which `trust` believes q, the anchor moves to θ and g and C are estimated anew, at most `max_refreshes` times an
    experience; at the end of each experience always. Before the first iteration L is that of the model as it has grown:
    where new outputs or unmasked units change it beyond `trust`, the model is estimated anew too, and so it is where
    parameters train that were frozen before. Each refresh and its reason are in `AdaptivePast.refreshes`. The penalty
    is q − L(a) + ½ τ ‖δ‖², with τ from `damping`: it stays bounded below where g leaves the range of C.

    `fraction` of an experience's examples are kept, drawn by `seed`. The idea of a region in which a quadratic model is
    trusted is that of Levenberg (1944) and of Conn et al. (2000).
    """

    trust: Trust = RelativeError(0.1)
    every: int = 5
    max_refreshes: int | None = 10
    damping: Damping = StepBound()
    fraction: float = 0.1
    seed: int = 0

    revises = True

    def __post_init__(self) -> None:
        settle(
            self, fraction=check_fraction, seed=check_seed, every=check_count, max_refreshes=optional(check_whole)
        )
        for name, value, expected, example in (
            ("trust", self.trust, Trust, "RelativeError(0.1), AbsoluteError(0.1) or RatioBand(0.5, 2.0)"),
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
    def revise(
        self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure
    ) -> Past:
        if past.model is None or iteration % self.every or self._left(past) <= 0:
            return past
        keep_what_trains(model)
        begun, past = past.model.unprotected(model), AdaptivePast.of(past)
        predicted = predicted_loss(past, model)
        grown = frozen_together(past.stored, model) if begun or not iteration else ()
        actual = sum(risk.value() for risk in grown)
        # what trains now and was frozen may have changed in the frozen past functions, which share it
        frozen = actual if begun else memory_loss(past.stored, model)
        actual = actual if grown else frozen
        reason = self.trust.broken(TrustCheck(past.loss, actual, predicted))
        if begun:
            reason = f"{in_words(begun)} train now and did not before"
        if reason is None:
            return past
        if actual != frozen:
            reason = f"growth changed the loss from {frozen:.3g} to {actual:.3g}: {reason}"
        if self._left(past) == 1:
            reason = f"{reason}; the last of {self.max_refreshes}"
        event = RefreshEvent(past.experiences, iteration, reason, actual, predicted)
        stored = grown or frozen_together(past.stored, model)
        return replace(
            self._refreshed(past, stored, curvature, structure), refreshes=(*past.refreshes, event)
        )

    def _left(self, past: Past) -> float:
        """How many refreshes this experience may still have."""
        done = sum(event.experience == past.experiences for event in past.refreshes)
        return math.inf if self.max_refreshes is None else self.max_refreshes - done

    def _refreshed(
        self, past: AdaptivePast, stored: tuple[EmpiricalRisk, ...], curvature: Curvature, structure: Structure
    ) -> AdaptivePast:
        """The past with the model of the stored examples at the parameters where they are frozen."""
        models = [estimate(curvature, structure, risk, gradient=True) for risk in stored]
        total, loss = sum_at_one_anchor(models), sum(risk.value() for risk in stored)
        tau = self.damping.amount(total)
        return replace(past, model=damped(total, tau), loss=loss, damping=tau, stored=stored)


@in_own_precision
def predicted_loss(past: Past, model: nn.Module) -> float:
    """q(θ) without its damping: the Taylor expansion of the loss of the stored examples; 0 without a past."""
    if past.model is None:
        return 0.0
    own, displacement = AdaptivePast.of(past), past.model.displacement(model)
    increase = past.model.increase(displacement) - half(own.damping * (displacement @ displacement))
    return own.loss + float(increase)


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
