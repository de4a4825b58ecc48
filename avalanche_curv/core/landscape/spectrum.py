"""The spectrum of a curvature matrix, exact or as a quadrature, and the interface of the methods that compute it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.landscape.averaged import AveragedCurvature


@dataclass(frozen=True)
class Density:
    """The spectral density of P eigenvalues: `counts[i]` of them lie at `nodes[i]`, in float64.

    The nodes are the eigenvalues themselves, or those of a quadrature with Σ_i f(λ_i) ≈ Σ_j counts_j f(nodes_j).

    >>> density = Density(torch.tensor([0.0, 1.0, 3.0, 3.0]), torch.tensor([6.0, 1.0, 1.0, 1.0]))
    >>> density.size, density.sum(), density.count_above(2.0)
    (9.0, 7.0, 2.0)
    """

    nodes: Float[Tensor, "n"]
    counts: Float[Tensor, "n"]

    @property
    def size(self) -> float:
        """P, the number of eigenvalues."""
        return float(self.counts.sum())

    def sum(self) -> float:
        """Σ_i λ_i, the trace."""
        return float(self.counts @ self.nodes)

    def magnitude(self) -> float:
        """Σ_i |λ_i|: the trace of a positive semi-definite matrix."""
        return float(self.counts @ self.nodes.abs())

    def count_above(self, threshold: float) -> float:
        """#{λ_i > threshold}, the number of eigenvalues above it."""
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


def mean_density(parts: Sequence[Density]) -> Density:
    """The mean of densities of the same matrix.

    >>> one, two = (Density(torch.tensor([value]), torch.ones(1)) for value in (1.0, 3.0))
    >>> mean_density([one, two]).sum()
    2.0
    """
    return Density(torch.cat([p.nodes for p in parts]), torch.cat([p.counts / len(parts) for p in parts]))


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a curvature, as one method computes it.

    `top` holds the k eigenpairs largest in magnitude, without those that are zero up to rounding; `sharpness` is the
    largest eigenvalue, `magnitude` Σ|λ|. `methods` says of each of QUANTITIES how it was computed, `exact` whether all
    are exact up to rounding. Of a density that is estimated, `probes` are the independent estimates whose mean it is;
    `trace_error` is the standard error of the trace, and `magnitude_is_known` says whether Σ|λ| is exact none the less.
    """

    density: Density
    top: Pairs
    sharpness: float
    trace: float
    magnitude: float
    exact: bool
    methods: Mapping[str, str]
    probes: tuple[Density, ...] = ()
    trace_error: float = 0.0
    magnitude_is_known: bool = True


class SpectrumMethod(ABC):
    """A method to compute a spectrum. One of your own needs `spectrum` and nothing else."""

    @abstractmethod
    def spectrum(self, averaged: AveragedCurvature, k: int) -> Spectrum | None:
        """The spectrum of the averaged curvature with its k eigenpairs largest in magnitude; None where this method
        does not apply: to a matrix that is too large, or of another form.

        Raises NonFiniteCurvatureError where the curvature holds NaN or infinity.
        """


QUANTITIES = ("sharpness", "trace", "numerical_rank", "effective_rank", "energy", "density", "top")


def exact_spectrum(density: Density, top: Pairs, method: str) -> Spectrum:
    """The spectrum of which every eigenvalue is known, all quantities by that method."""
    sharpness = float(density.nodes[density.counts > 0].max())
    methods = dict.fromkeys(QUANTITIES, method)
    return Spectrum(density, top, sharpness, density.sum(), density.magnitude(), True, methods)


def without_zeros(top: Pairs, size: int) -> Pairs:
    """The eigenpairs of a matrix of `size` rows whose eigenvalue is not zero up to rounding.

    >>> without_zeros((torch.tensor([2.0, 1e-9]), torch.eye(2)), 2)[0]
    tensor([2.])
    """
    values, vectors = top
    kept = values.abs() > size * torch.finfo(vectors.dtype).eps * values.abs().max() if len(values) else slice(None)
    return values[kept], vectors[kept]
