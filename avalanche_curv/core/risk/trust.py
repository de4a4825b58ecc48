"""Which of several ways to a derivative is right for a model: tried on a few examples against plain reverse mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.known import is_plain

TOLERANCE = 3e-3  # relative: more than rounding, also that of TF32, and less than any mistake
NEARBY = 0.02  # the width of the interval of parameters around the anchor in which derivatives are tried
PERIOD = 4093  # random numbers are drawn, and then repeated: a prime, so that no two rows of a weight are alike

W = TypeVar("W", bound=str)


Parts = Sequence[Tensor]


def right_way(
    risk: EmpiricalRisk, what: str, ways: Mapping[W, Callable[[], Parts]], exact: Callable[[], Parts], last: W
) -> W:
    """The name of the first way that gives the `exact` tensors on a few examples, or `last` where none does; the first
    without a trial for a model of known modules. `what` names the question: it is asked once of a frozen model.
    """
    if what not in risk.verdicts:
        with torch.no_grad(), untouched_randomness():
            risk.verdicts[what] = next(iter(ways)) if is_plain(risk.model) else _tried(ways, exact, last)
    return risk.verdicts[what]


def _tried(ways: Mapping[W, Callable[[], Parts]], exact: Callable[[], Parts], last: W) -> W:
    wanted = exact()
    for name, way in ways.items():
        try:
            found = way()
        except Exception:  # of any kind: torch has many for an operation without this derivative
            continue
        if not differing(found, wanted):
            return name
    return last


def differing(found: Parts, wanted: Parts, tolerance: float = TOLERANCE, size: float = 0.0) -> list[int]:
    """The places of those tensors that differ by more than rounding, that of numbers of this `size` at least; none
    where the wanted ones are not finite."""
    floor = 1e-5 * max(size, float(torch.stack([part.double().norm() for part in wanted]).norm()))
    if not floor < float("inf"):
        return []
    distances = [(float((a.to(b) - b).norm()), float(b.norm())) for a, b in zip(found, wanted)]
    return [i for i, (distance, size) in enumerate(distances) if not distance <= tolerance * size + floor]  # or NaN


def nearby(risk: EmpiricalRisk) -> list[Tensor]:
    """Parameters close to the anchor, at which derivatives can be tried that vanish there: those of the loss at a
    minimum, and all below a head of zeros."""
    generator = torch.Generator().manual_seed(0)
    noise = NEARBY * (torch.rand(PERIOD, generator=generator) - 0.5).to(risk.anchor)
    repeats = -(-risk.space.size // PERIOD)
    return risk.space.split(risk.anchor + noise.repeat(repeats)[: risk.space.size])


def directions(*shape: int, like: Tensor) -> Tensor:
    """Random numbers of this shape, the same at every call, in the type and on the device of `like`."""
    count = math.prod(shape)
    numbers = torch.randn(min(count, PERIOD), generator=torch.Generator().manual_seed(0)).to(like)
    return numbers.repeat(-(-count // len(numbers)))[:count].view(shape)
