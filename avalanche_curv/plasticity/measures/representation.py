"""Dormant units, ranks and change of hidden activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.options import is_number
from avalanche_curv.plasticity.measures.activations import Activations
from avalanche_curv.plasticity.measures.singular_values import effective_rank, leading_singular_values, stable_rank


@dataclass(frozen=True)
class Representation:
    """Of the activations H of one hidden layer, on a batch of N examples:

    - units: how many it has;
    - dormant: the fraction of them with `dormancy_scores` s_i ≤ τ (Sokar et al. 2023, definition 3.1);
    - zero: the fraction that is exactly zero on all of the batch, at all positions;
    - effective_rank and stable_rank of H as the matrix N × (positions · units), not centred: at most N.

    All but `units` are NaN where an activation is not finite.
    """

    units: int
    dormant: float
    zero: float
    effective_rank: float
    stable_rank: float


def representation(activations: Activations, threshold: float = 0.025) -> dict[str, Representation]:
    """That of each layer, from `hidden_activations`. `threshold` is τ; raises ValueError where it is negative.

    >>> from torch import tensor
    >>> h = tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> representation({"relu": h})["relu"].dormant
    0.5
    """
    if not is_number(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a finite number, at least 0; got {threshold!r}. 0 counts units of zeros.")
    return {name: _of_layer(h, threshold) for name, h in activations.items()}


def dormancy_scores(activations: Float[Tensor, "N *positions units"]) -> Float[Tensor, "units"]:
    """s_i = E|h_i| / ((1/H) Σ_k E|h_k|), the mean over examples and positions; their mean is 1. 0 for all units of a
    layer of zeros. Source: Sokar et al. 2023, equation 1.

    >>> from torch import tensor
    >>> dormancy_scores(tensor([[3.0, 0.0], [-3.0, 2.0]]))
    tensor([1.5000, 0.5000], dtype=torch.float64)
    """
    means = activations.detach().double().abs().flatten(0, -2).mean(0)
    whole = means.mean()
    return means if float(whole) == 0 else means / whole


def representation_change(before: Activations, now: Activations) -> float:
    """(1/L) Σ_l ‖H_l − H'_l‖_F / ‖H'_l‖_F over the layers, of the same inputs before (H') and now (H): 0 for none.

    A layer of zeros that stays one has not changed, and one that has become another has changed infinitely. Layers
    that exist in one of the two only, or have grown since, do not count; NaN where none is left.

    Lewandowski et al. 2024, section 5.2, speak of the distance between hidden activations at the beginning of one task
    and at that of the next, without a formula; relative to their size here, so that layers and networks compare.

    >>> from torch import tensor
    >>> representation_change({"relu": tensor([[3.0, 4.0]])}, {"relu": tensor([[3.0, 2.0]])})
    0.4
    """
    same = [name for name in before if name in now and now[name].shape == before[name].shape]
    changes = [_change(before[name].double(), now[name].double()) for name in same]
    return sum(changes) / len(changes) if changes else math.nan


def _of_layer(activations: Tensor, threshold: float) -> Representation:
    units = activations.shape[-1]
    if not activations.isfinite().all():
        return Representation(units, math.nan, math.nan, math.nan, math.nan)
    values = leading_singular_values(activations.flatten(1))
    return Representation(
        units=units,
        dormant=_fraction(dormancy_scores(activations) <= threshold),
        zero=_fraction((activations == 0).flatten(0, -2).all(0)),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
    )


def _fraction(which: Tensor) -> float:
    return int(which.sum()) / len(which)


def _change(before: Tensor, now: Tensor) -> float:
    difference, size = float((now - before).norm()), float(before.norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf
