"""How a direction lies to the top eigenvectors of a landscape, and how these turn as training moves on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.landscape.landscape import Landscape
from avalanche_curv.core.risk.parameters import ParameterSpace


@dataclass(frozen=True)
class Alignment:
    """Which part of a vector s lies in the span of orthonormal rows V, and which outside.

    inside = ‖V s‖ / ‖s‖ and leakage = ‖s − Vᵀ(V s)‖ / ‖s‖;
    inside² + leakage² = 1. Both are NaN for s = 0.
    """

    inside: float
    leakage: float


def alignment(vector: Float[Tensor, "P"], rows: Float[Tensor, "k P"]) -> Alignment:
    """See `Alignment`.

    >>> import torch
    >>> found = alignment(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    >>> round(found.inside, 6), round(found.leakage, 6)
    (0.6, 0.8)
    """
    length = float(vector.double().norm())
    if not length > 0:
        return Alignment(math.nan, math.nan)
    inside = rows @ vector
    rest = vector - inside @ rows
    return Alignment(float(inside.double().norm()) / length, float(rest.double().norm()) / length)


def overlap(old: Float[Tensor, "k P"], new: Float[Tensor, "l P"]) -> float:
    """‖V_old V_newᵀ‖_F² / max(k, l): 1 for orthonormal rows of the same span, 0 for orthogonal ones, and k / P on
    average for random ones of k rows. NaN where there are none.

    >>> import torch
    >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
    0.5
    """
    most = max(len(old), len(new))
    return float((old @ new.T).double().square().sum()) / most if most else math.nan


@dataclass(frozen=True)
class CurvatureDrift:
    """How the curvature of the same examples has changed: tr C_now / tr C_then (NaN where that was 0), and the overlap
    ‖V_then V_nowᵀ‖_F² / k of their top subspaces."""

    trace_ratio: float
    overlap: float


def curvature_drift(then: Landscape, now: Landscape) -> CurvatureDrift:
    """See `CurvatureDrift`. Coordinates that only one of them has count as zero in the other."""
    space = then.space.union(now.space)
    rows = (_embedded(one.top[1], one.space, space) for one in (then, now))
    return CurvatureDrift(now.trace / then.trace if then.trace else math.nan, overlap(*rows))


def _embedded(rows: Float[Tensor, "k P"], inner: ParameterSpace, outer: ParameterSpace) -> Tensor:
    if inner == outer:
        return rows
    result = rows.new_zeros(len(rows), outer.size)
    result[:, outer.positions(inner).to(rows.device)] = rows
    return result
