"""How a structure is computed from a kind of curvature: registered shortcuts and refusals, products elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.structures.base import Matrix, Structure

Rule = Callable[[Any, Any, EmpiricalRisk], Matrix]
R = TypeVar("R", bound=Rule)

Refusal = Callable[[Any, Any], str | None]

_RULES: dict[tuple[type, type], Rule] = {}
_REFUSALS: dict[tuple[type, type], Refusal] = {}


def check_pair(curvature: Curvature, structure: Structure) -> None:
    """Raises TypeError for a kind and a structure that do not go together, before anything is computed."""
    for pair in _pairs(curvature, structure):
        reason = _REFUSALS[pair](curvature, structure) if pair in _REFUSALS else None
        if reason:
            raise TypeError(reason)


def curvature_matrix(curvature: Curvature, structure: Structure, risk: EmpiricalRisk) -> Matrix:
    """The matrix of `structure` for the curvature of `risk`, mended where the kind asks for it, without checks."""
    return curvature.mended(structured(curvature, structure, risk))


def structured(curvature: Curvature, structure: Structure, risk: EmpiricalRisk) -> Matrix:
    """The matrix of `structure` for the curvature of `risk`, before the kind mends its eigenvalues: by the nearest
    registered rule, or else by products."""
    nearest = next((_RULES[pair] for pair in _pairs(curvature, structure) if pair in _RULES), by_products)
    return nearest(curvature, structure, risk)


def by_products(curvature: Curvature, structure: Structure, risk: EmpiricalRisk) -> Matrix:
    """The matrix of a structure from products of the kind's operator, which any pair has without a rule."""
    return structure.from_operator(curvature.operator(risk), risk)


def rule(curvature: type, structure: type) -> Callable[[R], R]:
    """Registers a shortcut for a pair of types and their subclasses; the nearest registered pair is taken.

    A shortcut must equal `by_products` and come with the test that shows it.
    """

    def register(shortcut: R) -> R:
        _RULES[curvature, structure] = shortcut
        return shortcut

    return register


def refusal(curvature: type, structure: type) -> Callable[[Refusal], Refusal]:
    """Registers why a pair of types and their subclasses cannot be had: a function that gives the reason, or None."""

    def register(reason: Refusal) -> Refusal:
        _REFUSALS[curvature, structure] = reason
        return reason

    return register


def has_rule(curvature: Curvature, structure: Structure) -> bool:
    """Whether a shortcut is registered for the pair."""
    return any(pair in _RULES for pair in _pairs(curvature, structure))


def _pairs(curvature: Curvature, structure: Structure) -> list[tuple[type, type]]:
    """The types of both and their bases, the nearest first."""
    return [(kind, form) for kind in type(curvature).__mro__ for form in type(structure).__mro__]
