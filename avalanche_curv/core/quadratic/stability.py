"""Whether gradient descent on a penalty diverges by itself: lr · strength · λ_max against what is stable."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from avalanche_curv.core.eigen import largest_of_products
from avalanche_curv.core.options import Fixed, check_kind, check_number, settle
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.risk.parameters import canonical_name


class UnstablePenaltyError(RuntimeError):
    """The penalty would diverge under this learning rate and strength."""


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

    def __str__(self) -> str:
        whose, rates = "", "this learning rate"
        if self.group is not None:
            whose, rates = f" of parameter group {self.group}, which limits most,", "these learning rates"
        slower = "" if self.group is None else " of that group, the others in proportion,"
        return (
            f"lr {self.rate:.3g}{whose} · strength {self.strength:.3g} · λ_max {self.sharpness:.3g} = "
            f"{self.product:.3g} is above {self.limit:.3g}, so that descent on the penalty alone diverges. It is "
            f"stable up to strength {self.largest_strength:.3g} at {rates}, or up to lr "
            f"{self.limit / (self.strength * self.sharpness):.3g}{slower} at this strength."
        )


@dataclass(frozen=True)
class Descent:
    """What decides the stability of SGD on the parameters of one group: the `rate` lr · (1 − dampening), the largest
    stable rate · curvature, `limit`, and the number of the `group`, None for parameters that no group steps."""

    rate: float
    limit: float
    group: int | None

    @property
    def pace(self) -> float:
        """rate / limit: the curvature of 1 / pace is the largest that is stable."""
        return self.rate / self.limit


AT_REST = Descent(0.0, 2.0, None)


def descents(optimizer: torch.optim.Optimizer) -> list[tuple[Descent, frozenset[int]]] | None:
    """The descent of each parameter group, and which trainable parameters it steps, by identity. None for an optimizer
    that scales its steps by their size, such as Adam."""
    if not isinstance(optimizer, torch.optim.SGD):
        return None
    found = []
    for number, group in enumerate(optimizer.param_groups):
        momentum = float(group["momentum"])
        limit = 2 * (1 + momentum) / ((1 + 2 * momentum) if group["nesterov"] else 1)
        descent = Descent(float(group["lr"]) * (1 - float(group["dampening"])), limit, number)
        found.append((descent, frozenset(id(p) for p in group["params"] if p.requires_grad)))
    return found


class Guard(ABC):
    """What is done about a penalty that would diverge."""

    @abstractmethod
    def strength(self, found: Stability) -> float:
        """The strength to train with, where `found` says that the penalty would diverge."""


@dataclass(frozen=True)
class WarnIfUnstable(Guard):
    """Warns of a penalty that would diverge, and trains on with it."""

    def strength(self, found: Stability) -> float:
        warnings.warn(f"{found} Or let guard=RescaleIfUnstable() lower it.", UserWarning, stacklevel=2)
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
        self._seen: object = None  # groups and strength for which the answer is known
        self._sharpness: float | None = None
        self._scaled: tuple[tuple[float, ...], float, int | None] | None = None

    def allowed(self, strength: float, optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
        """The strength for the next step of `optimizer` on `model`, at most `strength`. Raises what the guard
        raises."""
        strength = min(strength, self._bound)
        groups = None if self._passed or strength <= 0 else descents(optimizer)
        if self.guard is None or groups is None or (groups, strength) == self._seen:
            return strength
        found = self._stability(strength, groups, model)
        if found is not None and found.diverges:
            allowed = self.guard.strength(found)
            self._passed = allowed == strength
            self._bound = self._bound if self._passed else min(allowed, self._bound)
            strength = allowed
        self._seen = groups, strength
        return strength

    def renewed(self, past: QuadraticModel) -> Guarded:
        """The guard for a model of the past with a small part more: it is not asked again about what it let pass."""
        after = Guarded(self.guard, past)
        after._passed = self._passed
        return after

    def stability(self, strength: float, optimizer: torch.optim.Optimizer, model: nn.Module) -> Stability | None:
        """The stability of `optimizer` on strength · ½ δᵀCδ; None where it is not SGD, and where no rate, the strength
        or λ_max is positive.

        >>> from avalanche_curv import ParameterSpace
        >>> from avalanche_curv.core.structures import DiagonalMatrix
        >>> model = nn.Linear(1, 1, bias=False)
        >>> past = QuadraticModel(ParameterSpace.of(model), torch.zeros(1), DiagonalMatrix(torch.tensor([3.0])))
        >>> found = Guarded(None, past).stability(2.0, torch.optim.SGD(model.parameters(), lr=0.5), model)
        >>> found.product, found.limit, found.diverges
        (3.0, 2.0, True)
        """
        groups = descents(optimizer)
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
        own = {canonical_name(name): id(parameter) for name, parameter in model.named_parameters()}
        descent_of = {which: descent for descent, ids in groups for which in ids}
        each = [descent_of.get(own.get(name, 0), AT_REST) for name in self.past.space.names]
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
        root = torch.cat([like.new_full((size,), share**0.5) for size, share in zip(sizes, shares)])
        return largest_of_products(lambda v: root * self.past.curvature.product(root * v), like)
