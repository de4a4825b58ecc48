"""Where gᵀδ + ½ δᵀ C δ is least: by the inverse of C where its structure has one, else by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import indefinite
from avalanche_curv.core.structures.base import Matrix

Product = Callable[[Float[Tensor, "P"]], Float[Tensor, "P"]]


def rounding_of(like: Tensor) -> float:
    """Below this part of the largest eigenvalue, one of a matrix with numbers like these is zero or rounding.

    >>> round(rounding_of(torch.zeros(1)), 7)
    1.19e-05
    """
    return 100 * torch.finfo(like.dtype).eps


@dataclass(frozen=True)
class Descent:
    """A step δ towards C δ = −g after so many products. `flat` is the curvature along the direction at which the search
    ended because that is not positive, and `sharpest` the largest that it met; None where it ended otherwise."""

    step: Float[Tensor, "P"]
    products: int
    flat: float | None = None
    sharpest: float = 0.0


def minimum(
    curvature: Matrix,
    gradient: Float[Tensor, "P"],
    *,
    rounding: float,
    tolerance: float,
    max_products: int,
    scale: float | None = None,
    bounded: bool = False,
) -> Float[Tensor, "P"]:
    """δ with ‖C δ + g‖ ≤ tolerance · ‖g‖, for positive semi-definite C; the shortest one where C is singular.

    Eigenvalues up to `rounding` times the largest count as zero. `scale` stands for ‖g‖ where g is a sum, whose terms
    have these lengths in all; `bounded` says that it lies in the range of C but for rounding, as that of a sum of
    quadratics with minima does.

    Raises ValueError where there is no minimum: C has a negative eigenvalue, or g leaves its range; and RuntimeError
    where `max_products` products are not enough.
    """
    size = float(gradient.norm()) if scale is None else scale
    inverse = curvature.pseudo_inverse(rounding)
    if inverse is not None:
        step = -inverse.product(gradient)  # refined once: what is then left of g is out of the range of C
        step = step - inverse.product(curvature.product(step) + gradient)
        found = Descent(step, products=1, flat=0.0)
    else:
        found = conjugate_gradients(curvature.product, gradient, tolerance * size / 2, max_products)
    if found.flat is not None and found.flat < -rounding * found.sharpest:
        raise ValueError(indefinite(found.flat))
    residual = float((curvature.product(found.step) + gradient).norm())
    if residual <= tolerance * size or (bounded and found.flat is not None):
        return found.step
    if found.flat is not None:
        raise ValueError(
            f"The slope g, of length {size:.3g}, leaves the range of C by {residual:.3g}: along that part q falls "
            "without bound, and there is no minimum. Give a damping, such as damping=StepBound()."
        )
    raise RuntimeError(
        f"After {found.products} products ‖Cδ + g‖ is {residual:.3g}, which is {residual / size:.2g} of ‖g‖, and the "
        f"tolerance is {tolerance:g}. Give a damping, which makes C better conditioned, or a larger max_products or "
        "tolerance."
    )


def conjugate_gradients(
    product: Product, gradient: Float[Tensor, "P"], residual: float, max_products: int = 200
) -> Descent:
    """δ with ‖C δ + g‖ ≤ residual for positive semi-definite C and g in its range (Hestenes & Stiefel 1952): from zero,
    so that δ lies in that range too and is the shortest. Directions that are flat up to rounding are not followed.

    >>> conjugate_gradients(lambda v: torch.tensor([2.0, 4.0]) * v, torch.tensor([2.0, -4.0]), 1e-5).step.round()
    tensor([-1.,  1.])
    """
    step, left = torch.zeros_like(gradient), -gradient
    direction, size = left, left @ left
    sharpest, products = torch.zeros_like(size), 0
    while size > residual**2 and products < max_products:
        turned = product(direction)
        curved, length = direction @ turned, direction @ direction
        products, sharpest = products + 1, torch.maximum(sharpest, (curved / length).abs())
        if curved <= rounding_of(gradient) * sharpest * length:
            return Descent(step, products, float(curved / length), float(sharpest))
        far = size / curved
        step, left = step + far * direction, left - far * turned
        size, before = left @ left, size
        direction = left + size / before * direction
    return Descent(step, products)
