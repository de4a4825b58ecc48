"""Whether two frozen models are one function of parameters and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk

PLAIN = (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype, torch.device, torch.Size)


def same_function(one: EmpiricalRisk, other: EmpiricalRisk) -> bool:
    """Whether the frozen models of two risks give equal outputs wherever their parameters and inputs are equal: they
    are called in one way, and have modules of the same names and types whose attributes are equal, with buffers and the
    parameters outside of the space. What cannot be compared counts as another function, and so does a module that is
    held in a plain list or under no name.

    >>> a, b, c = (nn.Sequential(nn.Linear(1, 1), nn.LeakyReLU(slope)) for slope in (0.1, 0.1, 0.2))
    >>> a, b, c = (EmpiricalRisk.snapshot(m, nn.MSELoss(), [(torch.zeros(3, 1), torch.ones(3, 1))]) for m in (a, b, c))
    >>> same_function(a, b), same_function(a, c)
    (True, False)
    """
    if one.forward != other.forward or one.space != other.space:
        return False
    if one.base is other.base:
        return True
    free = {id(p) for p in (*one.parameters, *other.parameters)}
    ours, theirs = (dict(risk.base.named_modules()) for risk in (one, other))
    known = {id(ours[name]): id(theirs[name]) for name in ours.keys() & theirs.keys()}
    return ours.keys() == theirs.keys() and all(
        type(ours[name]) is type(theirs[name]) and _equal(vars(ours[name]), vars(theirs[name]), free, known)
        for name in ours
    )


def _equal(one: Any, other: Any, free: set[int], known: Mapping[int, int]) -> bool:
    """`free` are the parameters that may differ, and `known` the modules of one model that are compared by name with
    those of the other."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, nn.Module):
        return known.get(id(one)) == id(other)
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        return {id(one), id(other)} <= free or torch.equal(one, other)
    if isinstance(one, Mapping):
        return [*one] == [*other] and all(_equal(one[key], other[key], free, known) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_equal(*pair, free, known) for pair in zip(one, other))
    return isinstance(one, PLAIN) and bool(one == other)
