"""Singular values σ_1 ≥ ... ≥ σ_n ≥ 0 of a matrix, and from them its ranks and its condition number.

These are NaN where a singular value is.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

CLEAR = 1e-5  # share of σ_1 above which the root of an eigenvalue of the Gram matrix has three digits at least


def singular_values(matrix: Float[Tensor, "a b"]) -> Float[Tensor, "min_of_a_b"]:
    """The min(a, b) singular values of `matrix` in descending order; all NaN for a matrix that is not finite.

    They are those of the matrix in float64, whatever its type; values below σ_1 max(a, b) ε, ε = 2.2e-16, are 0. For
    types up to float32 they come from the Gram matrix, up to ten times faster than from a decomposition. That is used
    for float64, and where the smallest singular value lies below 1e-5 σ_1, which the Gram matrix does not resolve.

    >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 5.0]])).tolist()
    [5.0, 3.0]
    """
    matrix = matrix.detach()
    if matrix.dtype != torch.float64:
        values = leading_singular_values(matrix)
        if float(values.min()) > CLEAR * float(values.max()):
            return values
    matrix = matrix.double()
    if not matrix.isfinite().all():
        return matrix.new_full((min(matrix.shape),), math.nan)
    return _without_rounding(torch.linalg.svdvals(matrix), max(matrix.shape))


def leading_singular_values(matrix: Float[Tensor, "a b"]) -> Float[Tensor, "min_of_a_b"]:
    """The min(a, b) singular values of `matrix` in descending order, from its Gram matrix alone: values below about
    1e-8 σ_1, which do not matter for stable and effective ranks, are 0. All are NaN for a matrix that is not finite.

    >>> leading_singular_values(torch.tensor([[1.0, 0.0], [0.0, 1e-9]])).tolist()
    [1.0, 0.0]
    """
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).detach().double()
    return singular_values_of_gram(short @ short.T)


def singular_values_of_gram(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    """The singular values of G in descending order, as roots of the eigenvalues of its Gram matrix GGᵀ in float64.

    Values below σ_1 √(n ε), ε = 2.2e-16, cannot be distinguished from zero, and are 0. All are NaN for a matrix that is
    not finite.
    """
    if not gram.isfinite().all():
        return gram.new_full((len(gram),), math.nan)
    return _without_rounding(torch.linalg.eigvalsh(gram).flip(0), len(gram)).sqrt()


def _without_rounding(values: Tensor, size: int) -> Tensor:
    """The values, with zeros for those that may be due to rounding."""
    return torch.where(values > size * torch.finfo(values.dtype).eps * values.max(), values, 0.0)


def stable_rank(values: Float[Tensor, "n"]) -> float:
    """‖W‖_F² / σ_1² = Σ_i σ_i² / σ_1², the stable rank, from singular values: between 1 and the rank, 0 for a
    matrix of zeros.

    Source: Rudelson & Vershynin 2007, J. ACM 54(4), there called numerical rank.

    >>> stable_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    largest = float(values.max())
    return 0.0 if largest == 0 else float((values.double() / largest).square().sum())


def effective_rank(values: Float[Tensor, "n"]) -> float:
    """exp(−Σ_i p_i log p_i) with p_i = σ_i / Σ_j σ_j, the effective rank, from singular values: between 1 and the
    rank, 0 for a matrix of zeros.

    Source: Roy & Vetterli 2007, definition 1. Lewandowski et al. 2024, section 3.3, print Σ p_i log p_i in its place,
    without the exponential and with the other sign.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    total = values.double().sum()
    return 0.0 if float(total) == 0 else math.exp(float(torch.special.entr(values.double() / total).sum()))


def condition_number(values: Float[Tensor, "n"]) -> float:
    """σ_1 / σ_n, the condition number, from all min(a, b) singular values; infinite where the smallest is zero.

    >>> condition_number(torch.tensor([3.0, 1.5]))
    2.0
    """
    largest, smallest = float(values.max()), float(values.min())
    return math.inf if smallest == 0 else largest / smallest
