"""The spectrum of a curvature matrix, exact or as a quadrature, and the numbers that are read from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.landscape.averaged import AveragedCurvature


@dataclass(frozen=True)
class Density:
    """Where the P eigenvalues lie: `counts[i]` of them at `nodes[i]`, in float64.

    The nodes are the eigenvalues themselves, or those of a quadrature with Σ_i f(λ_i) ≈ Σ_j counts_j f(nodes_j).

    >>> density = Density(torch.tensor([0.0, 1.0, 3.0, 3.0]), torch.tensor([6.0, 1.0, 1.0, 1.0]))
    >>> density.size, density.sum(), density.count_above(2.0)
    (9.0, 7.0, 2.0)
    """

    nodes: Float[Tensor, "n"]
    counts: Float[Tensor, "n"]

    @property
    def size(self) -> float:
        """P."""
        return float(self.counts.sum())

    def sum(self) -> float:
        """Σ_i λ_i."""
        return float(self.counts @ self.nodes)

    def magnitude(self) -> float:
        """Σ_i |λ_i|: the trace of a positive semi-definite matrix."""
        return float(self.counts @ self.nodes.abs())

    def count_above(self, threshold: float) -> float:
        """#{λ_i > threshold}."""
        return float(self.counts[self.nodes > threshold].sum())

    def effective_rank(self) -> float:
        """exp(−Σ_i p_i log p_i) with p_i = |λ_i| / Σ_j |λ_j| (Roy & Vetterli 2007, definition 1), NaN for a matrix of
        zeros: r for r equal eigenvalues among zeros.

        >>> round(Density(torch.tensor([0.0, 2.0, -2.0]), torch.tensor([5.0, 2.0, 1.0])).effective_rank(), 5)
        3.0
        """
        magnitude = self.magnitude()
        if not magnitude > 0:
            return math.nan
        return math.exp(float(self.counts @ torch.special.entr(self.nodes.abs() / magnitude)))


@dataclass(frozen=True)
class Spectrum:
    """What one way finds of a spectrum.

    `top` holds the k eigenpairs largest in magnitude, without those that are zero up to rounding; `sharpness` is the
    largest eigenvalue, `magnitude` Σ|λ|. `ways` says of each quantity how it was computed, `exact` whether all are
    exact up to rounding.
    """

    density: Density
    top: Pairs
    sharpness: float
    trace: float
    magnitude: float
    exact: bool
    ways: Mapping[str, str]


class SpectrumMethod(ABC):
    """How a spectrum is computed. A way of your own needs `spectrum` and nothing else."""

    @abstractmethod
    def spectrum(self, averaged: AveragedCurvature, k: int) -> Spectrum | None:
        """The spectrum with its top k, or None where this way does not apply: too large, or of another form.

        Raises NonFiniteCurvatureError where the curvature holds NaN or infinity.
        """


QUANTITIES = ("sharpness", "trace", "numerical_rank", "effective_rank", "energy", "density", "top")


def exact_spectrum(density: Density, top: Pairs, way: str) -> Spectrum:
    """The spectrum of which every eigenvalue is known."""
    sharpness = float(density.nodes[density.counts > 0].max())
    ways = dict.fromkeys(QUANTITIES, way)
    return Spectrum(density, top, sharpness, density.sum(), density.magnitude(), True, ways)


def without_zeros(top: Pairs, size: int) -> Pairs:
    """The pairs whose eigenvalue is not zero up to rounding: of zeros the eigenvectors say nothing.

    >>> without_zeros((torch.tensor([2.0, 1e-9]), torch.eye(2)), 2)[0]
    tensor([2.])
    """
    values, vectors = top
    kept = values.abs() > size * torch.finfo(vectors.dtype).eps * values.abs().max() if len(values) else slice(None)
    return values[kept], vectors[kept]
