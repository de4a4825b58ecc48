"""Models that were trained apart, merged where the sum of their quadratic models is least."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.options import check_kind, check_number
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.minimum import minimum, rounding_of
from avalanche_curv.core.quadratic.model import QuadraticModel, check_damping, check_tolerances
from avalanche_curv.core.risk.parameters import ParameterSpace


@in_own_precision
def merged_parameters(
    models: Sequence[QuadraticModel],
    weights: Sequence[float] | None = None,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    max_products: int = 5000,
) -> dict[str, Tensor]:
    """The parameters of one network in the place of several that were trained apart, by name, for
    `model.load_state_dict(found, strict=False)`: those at which the sum of the quadratic models of their losses is
    least,

        θ = argmin Σ_t w_t [ q_t(θ) + ½ τ ‖θ − a_t‖² ] = ā − (Σ_t w_t (C_t + τI))⁺ Σ_t w_t C_t (ā − a_t)

    with ā = Σ_t w_t a_t / Σ_t w_t the average of their parameters a_t; the second form is for models without a slope at
    a_t. For a diagonal Fisher it is Fisher-weighted averaging, Σ_t w_t F_t a_t / Σ_t w_t F_t (Matena & Raffel 2022,
    arXiv:2111.09832, equation 4, who take F_t for no smaller than 1e-6). Equal curvatures give ā.

    `weights` w_t > 0 say how much each loss counts, 1 unless given: as `q_t` are of the mean loss, the numbers of
    examples stand for the loss of all examples together. `damping` τ ≥ 0, in units of curvature, pulls towards ā: it
    decides where curvature is small beside it, and what no model bends along stays at ā in any case. Parameters that
    some of the models alone have, such as a head for each task, are averaged over these.

    Networks merge well where a path without a barrier joins them, as when they begin from one pretrained network. What
    is not a parameter, such as the running statistics of batch norm, is to be estimated anew.

    The sum is exact, whatever a structure makes of sums otherwise: Kronecker products are kept as a list. It is solved
    as `QuadraticModel.minimiser` says, with `tolerance` a part of Σ_t ‖w_t C_t (ā − a_t)‖.

    Raises TypeError for models of different structures; ValueError for no model, for weights that are not one positive
    number for each, and where there is no minimum, since a C_t has a negative eigenvalue or a slope leaves the range of
    their sum; and RuntimeError where `max_products` products do not suffice.

    >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
    >>> space = ParameterSpace(("w",), (torch.Size([2]),))
    >>> one = QuadraticModel(space, torch.tensor([1.0, 1.0]), DiagonalMatrix(torch.tensor([3.0, 0.0])))
    >>> two = QuadraticModel(space, torch.tensor([5.0, 5.0]), DiagonalMatrix(torch.tensor([1.0, 0.0])))
    >>> merged_parameters([one, two])                        # (3 · 1 + 1 · 5) / 4; the second bends along neither
    {'w': tensor([2., 3.])}
    """
    shares = check_models(models, weights)
    check_damping("damping", damping)
    check_tolerances(tolerance, max_products)
    wide = models[0].anchor.new_empty(0, dtype=torch.float64)
    parts = [model.to(wide).scaled(share) for model, share in zip(models, shares)]
    space = reduce(lambda found, part: found.union(part.space), parts[1:], parts[0].space)
    average, places = _average(space, parts, shares)
    parts = [
        part.damped(damping * share).reanchored(average[at]).embedded(space)
        for part, at, share in zip(parts, places, shares)
    ]
    curvature = reduce(lambda total, matrix: total.plus(matrix), (part.curvature for part in parts))
    slopes = [part.gradient for part in parts if part.gradient is not None]
    scale = sum(float(slope.norm()) for slope in slopes)
    if scale:
        average = average + minimum(
            curvature, torch.stack(slopes).sum(0), scale=scale, tolerance=tolerance, max_products=max_products,
            rounding=max(rounding_of(model.anchor) for model in models),
            bounded=all(model.gradient is None for model in models),
        )  # fmt: skip
    like = reduce(torch.promote_types, (model.anchor.dtype for model in models))
    return dict(zip(space.names, space.split(average.to(like))))


def check_models(models: Sequence[QuadraticModel], weights: Sequence[float] | None) -> list[float]:
    """The weights, 1 for each model unless given. Raises TypeError for what is no quadratic model, and ValueError for
    none and for weights that are not one positive number for each."""
    if len(models) == 0:
        raise ValueError("There is nothing to merge: give a quadratic model of each network, as estimate(...) returns.")
    for model in models:
        check_kind("models", model, QuadraticModel, "[estimate(Fisher(), Diagonal(), risk), ...]")
    shapes: dict[str, torch.Size] = {}
    for name, shape in (pair for model in models for pair in zip(model.space.names, model.space.shapes)):
        if shapes.setdefault(name, shape)[1:] != shape[1:]:
            raise ValueError(
                "Networks that are merged must be of one architecture, but for outputs that a head lacks; "
                f"'{name}' has shapes {[*shapes[name]]} and {[*shape]}."
            )
    if weights is None:
        return [1.0] * len(models)
    if len(weights) != len(models):
        raise ValueError(f"weights must be one number for each of the {len(models)} models; got {len(weights)}.")
    check = partial(check_number, above=0, hint="It says how much the loss of a model counts: its number of examples.")
    return [check("weights", weight) for weight in weights]


def _average(
    space: ParameterSpace, parts: Sequence[QuadraticModel], shares: Sequence[float]
) -> tuple[Float[Tensor, "P"], list[Tensor]]:
    """ā over all models that have a coordinate, and the places of the coordinates of each model in the space."""
    like = parts[0].anchor
    places = [space.positions(part.space).to(like.device) for part in parts]
    total, weight = like.new_zeros(space.size), like.new_zeros(space.size)
    for part, at, share in zip(parts, places, shares):
        total[at] += share * part.anchor
        weight[at] += share
    return total / weight, places
