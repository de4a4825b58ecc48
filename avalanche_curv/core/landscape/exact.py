"""Spectra whose every eigenvalue is exact: of the matrix where it is small, or of the Gram matrix of its few rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import WHOLE, Pairs, spectrum, top_of_products
from avalanche_curv.core.landscape.averaged import AveragedCurvature, rows_of_all
from avalanche_curv.core.landscape.spectrum import Density, Spectrum, SpectrumMethod, exact_spectrum, without_zeros
from avalanche_curv.core.options import check_count, settle
from avalanche_curv.core.per_example.gram import Rows, lifted


@dataclass(frozen=True)
class WholeMatrix(SpectrumMethod):
    """The spectrum by the eigendecomposition of the P × P matrix in float64, for P up to `largest`.

    Raises ValueError unless `largest` is an integer of at least 1.
    """

    largest: int = 1500

    def __post_init__(self) -> None:
        settle(self, largest=check_count)

    def spectrum(self, averaged: AveragedCurvature, k: int) -> Spectrum | None:
        size = averaged.space.size
        if size > self.largest:
            return None
        values, (top, vectors) = decomposed(averaged.whole(), k)
        pairs = without_zeros((top.to(averaged.like), vectors.to(averaged.like)), size)
        return exact_spectrum(_each_once(values), pairs, f"eigendecomposition of all {size} rows")


@dataclass(frozen=True)
class GramMatrix(SpectrumMethod):
    """The spectrum by the M × M matrix GGᵀ of a curvature C = GᵀG, which shares its non-zero eigenvalues, for M up to
    `rows`.

    M is the number of examples times that of the columns of S (see `OutputCurvature`): 1 for an empirical Fisher, one
    less than the classes for the Fisher and the GGN of cross-entropy. Raises ValueError unless `rows` is an integer of
    at least 1.
    """

    rows: int = 3000

    def __post_init__(self) -> None:
        settle(self, rows=check_count)

    def spectrum(self, averaged: AveragedCurvature, k: int) -> Spectrum | None:
        rows = rows_of_all(averaged, self.rows)
        if rows is None:
            return None
        gram = averaged.checked(_gram(rows))
        values, (top, u) = decomposed(gram, min(k, averaged.space.size))
        top, u = without_zeros((top.to(averaged.like), u.to(averaged.like)), len(gram))
        vectors = lifted(rows, averaged.space, u.T)  # the eigenvectors Gᵀu / ‖Gᵀu‖ of GᵀG from those of GGᵀ, u
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        return exact_spectrum(_padded(values, averaged.space.size), (top, vectors), f"Gram matrix of {len(gram)} rows")


def decomposed(matrix: Float[Tensor, "n n"], k: int) -> tuple[Float[Tensor, "n"], Pairs]:
    """All eigenvalues of a symmetric matrix in rising order, and the k eigenpairs largest in magnitude, largest first;
    eigenvectors are rows.

    >>> values, (top, _) = decomposed(torch.diag(torch.tensor([1.0, -4.0, 3.0])), 2)
    >>> values.tolist(), top.tolist()
    ([-4.0, 1.0, 3.0], [-4.0, 3.0])
    """
    if len(matrix) > WHOLE:  # all eigenvectors would take several times as long
        return torch.linalg.eigvalsh(matrix), top_of_products(lambda v: matrix @ v, matrix[0], k)
    values, vectors = spectrum(matrix)
    order = values.abs().argsort(descending=True)[:k]
    return values, (values[order], vectors[:, order].T.contiguous())


def _gram(rows: list[Rows]) -> Float[Tensor, "M M"]:
    """GGᵀ, summed over layers in float64."""
    first, *others = (part.gram().double() for part in rows)
    for other in others:
        first += other
    return first


def _padded(values: Float[Tensor, "M"], size: int) -> Density:
    """The P eigenvalues of GᵀG from those of GGᵀ, which differ by zeros."""
    density = _each_once(values.clamp_min(0)[-size:])
    zeros = size - len(density.nodes)
    if not zeros:
        return density
    counts = torch.cat([density.counts.new_full((1,), zeros), density.counts])
    return Density(torch.cat([density.nodes.new_zeros(1), density.nodes]), counts)


def _each_once(values: Float[Tensor, "n"]) -> Density:
    values = values.cpu()
    return Density(values, torch.ones_like(values))
