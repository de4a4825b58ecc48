"""Whether gradient descent on a penalty diverges by itself: lr · strength · λ_max against what is stable."""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.arguments import outside, takes
from avalanche_curv.core.eigen import largest_of_products
from avalanche_curv.core.options import Fixed, check_kind, check_number, settle
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.paces import AT_REST, Descent, adam_paces, descents, rates
from avalanche_curv.core.quadratic.policies import Past
from avalanche_curv.core.risk.parameters import canonical_parameters


class UnstablePenaltyError(RuntimeError):
    """The penalty would diverge under this learning rate and strength."""


TRIED = 4  # strengths of a grid
PROBES = 4  # products for a ratio of traces


def decades(top: float) -> tuple[float, ...]:
    """`top`, rounded down to one digit, and the decades below it.

    >>> decades(34.6)
    (30.0, 3.0, 0.3, 0.03)
    """
    top = min(top, sys.float_info.max)
    exponent = math.floor(math.log10(top))
    digit = math.floor(top / 10.0**exponent * (1 + 1e-9))
    return tuple(float(f"{digit}e{exponent - k}") for k in range(TRIED))


@dataclass(frozen=True)
class StrengthSuggestion:
    """Strengths to try: `grid`, by decades from the largest down, and `largest_stable`, what they are derived from,
    None where no such rule is known. `reason` says in words what it means for this optimizer.

    >>> print(StrengthSuggestion.below(69.2, "descent on the penalty alone is stable up to strength 69.2"))
    Strengths to try: 30, 3, 0.3, 0.03 (descent on the penalty alone is stable up to strength 69.2).
    """

    largest_stable: float | None
    grid: tuple[float, ...]
    reason: str

    @classmethod
    def below(cls, largest: float, reason: str) -> StrengthSuggestion:
        """From half of the largest stable strength down, which leaves as much to the curvature of the loss."""
        return cls(largest, decades(largest / 2), reason)

    def above(self, strength: float) -> StrengthSuggestion:
        """Without what is no larger than a strength that does too little, where something is."""
        larger = tuple(one for one in self.grid if one > strength)
        return replace(self, grid=larger) if larger else self

    @property
    def numbers(self) -> str:
        """The grid in words."""
        return ", ".join(f"{strength:g}" for strength in self.grid)

    def __str__(self) -> str:
        return f"Strengths to try: {self.numbers or 'none'} ({self.reason})."


@dataclass(frozen=True)
class Stability:
    """Gradient descent on strength · ½ δᵀCδ: each step multiplies the displacement along the top eigenvector.

    It diverges where `product` = rate · strength · λ_max exceeds `limit`: 2 for plain SGD, 2 (1 + β) with momentum β,
    and 2 (1 + β) / (1 + 2β) with Nesterov's. `rate` is lr · (1 − dampening). Where rates differ, `group` is the number
    of the parameter group that limits the strength most, whose rate and limit these are, and `sharpness` the λ_max that
    has the same effect as all groups together (see `Guarded`).
    """

    rate: float
    strength: float
    sharpness: float
    limit: float
    group: int | None = None

    @property
    def product(self) -> float:
        return self.rate * self.strength * self.sharpness

    @property
    def diverges(self) -> bool:
        return self.product > self.limit

    @property
    def largest_strength(self) -> float:
        """The strength at which the product reaches the limit."""
        return self.limit / (self.rate * self.sharpness)

    @property
    def suggestion(self) -> StrengthSuggestion:
        """What `suggest_strength` returns for SGD."""
        largest = self.largest_strength
        return StrengthSuggestion.below(
            largest, f"descent on the penalty alone is stable up to strength {largest:.3g} at this learning rate"
        )

    def __str__(self) -> str:
        whose, rates = "", "this learning rate"
        if self.group is not None:
            whose, rates = f" of parameter group {self.group}, which limits most,", "these learning rates"
        slower = "" if self.group is None else " of that group, the others in proportion,"
        return (
            f"lr {self.rate:.3g}{whose} · strength {self.strength:.3g} · λ_max {self.sharpness:.3g} = "
            f"{self.product:.3g} is above {self.limit:.3g}, so that descent on the penalty alone diverges. It is "
            f"stable up to strength {self.largest_strength:.3g} at {rates} (to try: {self.suggestion.numbers}; see "
            f"suggest_strength), or up to lr "
            f"{self.limit / (self.strength * self.sharpness):.3g}{slower} at this strength."
        )


class Guard(ABC):
    """What is done about a penalty that would diverge."""

    @abstractmethod
    def strength(self, found: Stability) -> float:
        """The strength to train with, where `found` says that the penalty would diverge."""


@dataclass(frozen=True)
class WarnIfUnstable(Guard):
    """Warns of a penalty that would diverge, and trains on with it."""

    def strength(self, found: Stability) -> float:
        warnings.warn(f"{found} Or let guard=RescaleIfUnstable() lower it.", UserWarning, stacklevel=outside())
        return found.strength


@dataclass(frozen=True)
class RescaleIfUnstable(Guard):
    """Lowers the strength to `margin` of the largest stable one, for as long as the quadratic model stays."""

    margin: float = 0.5

    def __post_init__(self) -> None:
        settle(self, margin=partial(check_number, above=0, at_most=1, hint="1 is the edge of stability."))

    def strength(self, found: Stability) -> float:
        return self.margin * found.largest_strength


@dataclass(frozen=True)
class StopIfUnstable(Guard):
    """Raises UnstablePenaltyError before the step that would take this penalty."""

    def strength(self, found: Stability) -> float:
        raise UnstablePenaltyError(str(found))


def check_guard(name: str, value: Any) -> Guard | None:
    """`value`. Raises TypeError unless it is a guard or None."""
    known = "WarnIfUnstable(), RescaleIfUnstable(), StopIfUnstable() or None"
    return None if value is None else check_kind(name, value, Guard, known)


class Guarded:
    """The strength that a guard allows for one quadratic model, looked at again where rates or the strength change.

    With the rates r_g and limits ℓ_g of the parameter groups, R = diag(r_g / ℓ_g), zero for parameters that are frozen
    or in no group, descent on strength · ½ δᵀCδ diverges where strength · λ_max(R^½ C R^½) > 1. For positive
    semi-definite C it is stable otherwise, whichever momenta, Nesterov's or not, the groups have. An eigenvalue z of
    the iteration with eigenvector v satisfies Σ_g |v_g|² F_g(z) = −strength · vᴴCv, with F_g(z) = (z − 1)(z − β_g) over
    r_g z, or over r_g ((1 + β_g) z − β_g) with Nesterov's. F_g has the sign of Im z off the real axis where |z| ≥ 1, so
    that such a z is real, and −F_g(z) rises from ℓ_g / r_g at z = −1 to infinity at −∞. Weight decay and the loss,
    which add to the curvature, do not count.

    A guard that lets a diverging penalty pass is not asked again about it; a strength that it lowers stays low for this
    model. λ_max is computed once, and R^½ C R^½ looked at only where r_max λ_max does not tell, once for each
    proportion of the rates.
    """

    guard = Fixed[Guard | None]()
    past = Fixed[QuadraticModel]()

    def __init__(self, guard: Guard | None, past: QuadraticModel) -> None:
        self.guard, self.past = guard, past
        self._passed = guard is None
        self._bound = math.inf  # of the strength, by the guard
        self._seen: object = None  # strength and rates for which the answer is known
        self._sharpness: float | None = None
        self._scaled: tuple[tuple[float, ...], float, int | None] | None = None

    def allowed(self, strength: float, model: nn.Module, *optimizers: torch.optim.Optimizer) -> float:
        """The strength for the next step of `model`, of which each of the `optimizers` makes a part: at most
        `strength`. Without optimizers the guard is not asked. Raises what the guard raises."""
        strength = min(strength, self._bound)
        if self.guard is None or self._passed or strength <= 0:
            return strength
        known = strength, rates(*optimizers)
        groups = None if known == self._seen else descents(*optimizers)
        if groups is None:
            return strength
        found = self._stability(strength, groups, model)
        if found is not None and found.diverges:
            allowed = self.guard.strength(found)
            self._passed = allowed == strength
            self._bound = self._bound if self._passed else min(allowed, self._bound)
            strength = allowed
        self._seen = known
        return strength

    def renewed(self, past: QuadraticModel) -> Guarded:
        """The guard for a model of the past with a small part more: it is not asked again about what it let pass."""
        after = Guarded(self.guard, past)
        after._passed = self._passed
        return after

    def stability(self, strength: float, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Stability | None:
        """The stability of the `optimizers` of one model on strength · ½ δᵀCδ; None where none is SGD, and where no
        rate, the strength or λ_max is positive.

        >>> from avalanche_curv import ParameterSpace
        >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
        >>> model = nn.Linear(1, 1, bias=False)
        >>> past = QuadraticModel(ParameterSpace.of(model), torch.zeros(1), DiagonalMatrix(torch.tensor([3.0])))
        >>> found = Guarded(None, past).stability(2.0, model, torch.optim.SGD(model.parameters(), lr=0.5))
        >>> found.product, found.limit, found.diverges
        (3.0, 2.0, True)
        """
        groups = descents(*optimizers)
        return None if groups is None else self._stability(strength, groups, model)

    def state_dict(self) -> dict[str, Any]:
        """What the guard has decided about this model."""
        return {"passed": self._passed, "bound": self._bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned of the same model."""
        self._passed, self._bound = bool(state["passed"]), float(state["bound"])

    def __getstate__(self) -> dict[str, Any]:
        """Without what is known by the identity of parameters."""
        return {**self.__dict__, "_seen": None}

    def _stability(
        self, strength: float, groups: list[tuple[Descent, frozenset[int]]], model: nn.Module
    ) -> Stability | None:
        own, descent_of = canonical_parameters(model), {which: descent for descent, ids in groups for which in ids}
        each = [descent_of.get(id(own.get(name)), AT_REST) for name in self.past.space.names]
        fastest = max(each, key=lambda descent: descent.pace)
        if self._sharpness is None:
            self._sharpness = self.past.curvature.largest()
        if min(fastest.pace, strength, self._sharpness) <= 0:
            return None
        found = Stability(fastest.rate, strength, self._sharpness, fastest.limit)
        if not found.diverges or all(descent.pace == fastest.pace for descent in each):
            return found
        return self._by_group(strength, each, fastest)

    def _by_group(self, strength: float, each: list[Descent], fastest: Descent) -> Stability | None:
        """The stability from λ_max(R^½ C R^½), with the numbers of the group whose own block of it has the largest."""
        shares = tuple(round(descent.pace / fastest.pace, 9) for descent in each)
        if self._scaled is None or self._scaled[0] != shares:
            numbers = dict.fromkeys(d.group for d in each if d.pace > 0)
            blocks = {n: tuple(s if d.group == n else 0.0 for s, d in zip(shares, each)) for n in numbers}
            limiting = max(numbers, key=lambda n: self._largest(blocks[n]))
            self._scaled = shares, self._largest(shares), limiting
        _, largest, number = self._scaled
        slowest = next(descent for descent in each if descent.group == number)
        sharpness = largest * fastest.pace / slowest.pace
        return Stability(slowest.rate, strength, sharpness, slowest.limit, number) if sharpness > 0 else None

    def _largest(self, shares: tuple[float, ...]) -> float:
        """λ_max(S^½ C S^½) for S = diag(shares), one for each parameter."""
        like, sizes = self.past.anchor, self.past.space.sizes
        return _largest_scaled(
            self.past, torch.cat([like.new_full((size,), share) for size, share in zip(sizes, shares)])
        )


@takes(optimizer=(torch.optim.Optimizer, "strategy.optimizer"), model=(nn.Module, "strategy.model"))
def suggest_strength(
    past: Past | QuadraticModel, optimizer: torch.optim.Optimizer, model: nn.Module
) -> StrengthSuggestion:
    """Strengths to try with this past (that of a run with any strength), its optimizer and its model, a factor of ten
    apart.

    - SGD: `largest_stable` is where descent on the penalty alone begins to diverge, for the learning rates, momenta and
      λ_max(C) of now, by the rule of the guards (`Guarded`). The grid begins at half of it, to one digit.
    - Adam, AdamW: `largest_stable` is the largest that is stable while the second moments stay what they are
      (`adam_paces`). Above it nothing diverges: second moments grow with the penalty where it is unstable, until it is
      stable again. A few coordinates decide `largest_stable`; the grid begins where the curvature on average, weighted
      by itself, is at the limit: at tr(C) / tr(C R C) with R of `adam_paces`. Above, the gradients of the penalty and
      not those of the task decide the length of steps.
    - Others, and Adam before its first step: no rule is known, `largest_stable` is None, and the grid the decades from
      1,000 to 1. At 1 each past experience weighs as much as the new one, as if its examples were trained on again,
      which a quadratic model tells too little of; strengths above 1 make up for that.

    With a policy that stores examples and estimates the model anew from them, begin with 1. The grid is empty where no
    strength acts: C has no positive eigenvalue, or no parameter in it is stepped.

        suggestion = suggest_strength(strategy.past, strategy.optimizer, strategy.model)
        for strength in suggestion.grid: ...

    >>> from avalanche_curv import ParameterSpace
    >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
    >>> model = nn.Linear(1, 1, bias=False)
    >>> past = QuadraticModel(ParameterSpace.of(model), torch.zeros(1), DiagonalMatrix(torch.tensor([4.0])))
    >>> print(suggest_strength(past, torch.optim.SGD(model.parameters(), lr=0.1), model))
    Strengths to try: 2, 0.2, 0.02, 0.002 (descent on the penalty alone is stable up to strength 5 at this learning
    rate).

    Raises ValueError for an empty past, TypeError for what is none.
    """
    quadratic = past.model if isinstance(past, Past) else past
    if quadratic is None:
        raise ValueError(
            "This past is empty, and without curvature nothing can be said of a strength. Train at least one "
            "experience with any strength, then call suggest_strength(strategy.past, strategy.optimizer, "
            "strategy.model)."
        )
    if not isinstance(quadratic, QuadraticModel):
        raise TypeError(f"past must be a Past or a QuadraticModel; got {past!r}. Give strategy.past or plugin.past.")
    if descents(optimizer) is not None:
        found = Guarded(None, quadratic).stability(math.inf, model, optimizer)
        return NO_STRENGTH_ACTS if found is None else found.suggestion
    paces, kind = adam_paces(optimizer, model, quadratic.space), type(optimizer).__name__
    sharpness = math.nan if paces is None else _largest_scaled(quadratic, paces)
    if paces is None or not math.isfinite(sharpness):
        return without_rule(f"no rule is known for this state of {kind}")
    if sharpness <= 0:
        return NO_STRENGTH_ACTS
    largest, typical = 1 / sharpness, 1 / min(sharpness, _typical_scaled(quadratic, paces))
    return StrengthSuggestion(
        largest,
        decades(typical),
        f"with the second moments of {kind} as they are, no direction of the penalty is unstable up to strength "
        f"{largest:.3g}, and its curvature on average not up to {typical:.3g}",
    )


def without_rule(reason: str) -> StrengthSuggestion:
    """The decades from 1,000 to 1, for this reason."""
    return StrengthSuggestion(None, (1000.0, 100.0, 10.0, 1.0), reason)


NO_STRENGTH_ACTS = StrengthSuggestion(
    None, (), "C has no positive eigenvalue in parameters that are stepped, at a rate above 0, so that no strength acts"
)


def _largest_scaled(past: QuadraticModel, paces: Tensor) -> float:
    """λ_max(R^½ C R^½) for R = diag(paces)."""
    root = paces.to(past.anchor).sqrt()
    return largest_of_products(lambda v: root * past.curvature.product(root * v), past.anchor)


def _typical_scaled(past: QuadraticModel, paces: Tensor) -> float:
    """tr(C R C) / tr(C) for R = diag(paces), at most λ_max(R^½ C R^½) for positive semi-definite C; from products with
    random signs, which give it exactly for diagonal C. Infinity where that trace is not positive."""
    generator, paces = torch.Generator().manual_seed(0), paces.to(past.anchor)
    scaled = trace = 0.0
    for _ in range(PROBES):
        signs = 2.0 * torch.randint(2, (len(paces),), generator=generator).to(past.anchor) - 1
        product = past.curvature.product(signs)
        scaled, trace = scaled + float(product @ (paces * product)), trace + float(signs @ product)
    return scaled / trace if trace > 0 else math.inf
