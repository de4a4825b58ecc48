"""A trust region for the picture of the past: measure its error while training, and draw it anew where it is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import nn

from avalanche_curv.core.curvature import Curvature
from avalanche_curv.core.damping import Damping, StepBound, damped
from avalanche_curv.core.estimate import estimate
from avalanche_curv.core.options import is_count
from avalanche_curv.core.policies import Past, Refreshed, RevisingPolicy, check_fraction, part_of
from avalanche_curv.core.quadratic import QuadraticModel, half
from avalanche_curv.core.risk import EmpiricalRisk, frozen_together
from avalanche_curv.core.structures import Structure
from avalanche_curv.core.trust import Check, RelativeError, Trust


@dataclass(frozen=True)
class AdaptiveRefresh(RevisingPolicy):
    """Stores a random part of each experience's examples and keeps the quadratic model of their loss within its region.

    With L(θ) = Σ_t L_t(θ) the loss of the stored examples, the mean over each past experience, the model is its
    expansion at the newest anchor a,

        q(θ) = L(a) + gᵀδ + ½ δᵀ C δ,   δ = θ − a,   g = ∇L(a),   C = Σ_t C_t(a).

    Every `every` iterations L(θ) is measured, one forward pass over the stored examples. Where it leaves the region in
    which `trust` believes q, the anchor moves to θ and g and C are estimated anew, at most `max_refreshes` times an
    experience; at the end of each experience always. Before the first iteration L is that of the model as it has grown:
    where new outputs or unmasked units change it beyond `trust`, the picture is drawn anew too. Each refresh and its
    reason are in `Past.refreshes`. The penalty is q − L(a) + ½ τ ‖δ‖², with τ from `damping`: it stays bounded below
    where g leaves the range of C.

    `fraction` of an experience's examples are kept, drawn by `seed`. The idea of a region in which a quadratic model is
    trusted is that of Levenberg (1944) and of Conn et al. (2000).
    """

    trust: Trust = RelativeError(0.1)  # noqa: RUF009  a frozen value
    every: int = 5
    max_refreshes: int | None = 10
    damping: Damping = StepBound()  # noqa: RUF009
    fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction("AdaptiveRefresh", self.fraction)
        for name, value, expected, example in (
            ("trust", self.trust, Trust, "RelativeError(0.1), AbsoluteError(0.1) or RatioBand(0.5, 2.0)"),
            ("damping", self.damping, Damping, "StepBound(10.0) or Tikhonov(0.0)"),
        ):
            if not isinstance(value, expected):
                raise TypeError(f"AdaptiveRefresh({name}=...) takes {example}; got {value!r}.")
        if not is_count(self.every):
            raise ValueError(f"AdaptiveRefresh needs every to be at least 1 iteration; got {self.every!r}.")
        if self.max_refreshes is not None and not (is_count(self.max_refreshes) or self.max_refreshes == 0):
            raise ValueError(
                f"AdaptiveRefresh needs max_refreshes of at least 0, or None for no limit; got {self.max_refreshes!r}."
            )

    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        newest = part_of(risk, self.fraction, self.seed, past.experiences)
        stored = (*(old.at(risk) for old in past.stored), newest)
        return replace(past, **self._drawn(stored, curvature, structure), experiences=past.experiences + 1)

    def revise(
        self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure
    ) -> Past:
        if past.model is None or iteration % self.every or self._left(past) <= 0:
            return past
        predicted, frozen = predicted_loss(past, model), memory_loss(past.stored, model)
        grown = () if iteration else frozen_together(past.stored, model)
        actual = sum(risk.value() for risk in grown) if grown else frozen
        reason = self.trust.broken(Check(past.loss, actual, predicted))
        if reason is None:
            return past
        if actual != frozen:
            reason = f"growth changed the loss from {frozen:.3g} to {actual:.3g}: {reason}"
        if self._left(past) == 1:
            reason = f"{reason}; the last of {self.max_refreshes}"
        event = Refreshed(past.experiences, iteration, reason, actual, predicted)
        drawn = self._drawn(grown or frozen_together(past.stored, model), curvature, structure)
        return replace(past, **drawn, refreshes=(*past.refreshes, event))

    def _left(self, past: Past) -> float:
        """How many refreshes this experience may still have."""
        done = sum(event.experience == past.experiences for event in past.refreshes)
        return math.inf if self.max_refreshes is None else self.max_refreshes - done

    def _drawn(self, stored: tuple[EmpiricalRisk, ...], curvature: Curvature, structure: Structure) -> dict:
        """The picture of the stored examples at the parameters where they are frozen."""
        models = [estimate(curvature, structure, risk, gradient=True) for risk in stored]
        total, loss = sum_at_one_anchor(models), sum(risk.value() for risk in stored)
        tau = self.damping.amount(total)
        return {"model": damped(total, tau), "loss": loss, "damping": tau, "stored": stored}


def predicted_loss(past: Past, model: nn.Module) -> float:
    """q(θ) without its damping: the Taylor picture of the loss of the stored examples."""
    if past.model is None:
        return 0.0
    displacement = past.model.displacement(model)
    increase = past.model.increase(displacement) - half(past.damping * (displacement @ displacement))
    return past.loss + float(increase)


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
