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
    parameters outside of the space. What cannot be compared counts as another function.

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
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name], free, module=True) for name in ours)


def _equal(one: Any, other: Any, free: set[int], *, module: bool = False) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, nn.Module):
        return not module or _equal(vars(one), vars(other), free)  # those inside are compared by name
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        return {id(one), id(other)} <= free or torch.equal(one, other)
    if isinstance(one, Mapping):
        return [*one] == [*other] and all(_equal(one[key], other[key], free) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_equal(*pair, free) for pair in zip(one, other))
    return isinstance(one, PLAIN) and bool(one == other)
