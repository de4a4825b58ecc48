"""The spectrum of a matrix known by its products alone: top eigenpairs, stochastic Lanczos quadrature, XTrace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import TOLERANCE, Pairs, Product, deflated, quadrature, top_of_products
from avalanche_curv.core.landscape.averaged import AveragedCurvature
from avalanche_curv.core.landscape.spectrum import Density, Spectrum, SpectrumMethod, mean_density, without_zeros
from avalanche_curv.core.options import check_count, check_seed, settle


@dataclass(frozen=True)
class Lanczos(SpectrumMethod):
    """The spectrum by matrix-vector products alone, at any size.

    The top k are exact to a residual of 1e-5. What lies below is a quadrature of `probes` random starts of `steps`
    Lanczos steps each (Golub & Welsch 1969; Ghorbani et al. 2019, algorithm 1) on the complement of the top k: a sum
    Σ f(λ_i) over it is unbiased up to the quadrature of f, and its deviation falls as 1/√probes. Where zero lies amid
    the spectrum, as of a Hessian, |λ| bends there: effective rank and energy then want `steps` of 100.

    The trace comes from the exact diagonal where that is cheap, and otherwise from XTrace with `trace_products`
    products on that complement (Epperly et al. 2024). It deviates by a part of the sum of |λ|: of an indefinite matrix,
    whose eigenvalues cancel in the trace, that can be many percent of it. `Landscape.errors` states the standard error
    of each number, from the spread of the probes; quadruple the products, or the probes, to halve it. All draws come
    from `seed`. Raises ValueError for options that are no counts, an odd number of `trace_products`, and a seed that is
    no integer.
    """

    probes: int = 4
    steps: int = 40
    trace_products: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, probes=check_count, steps=check_count, trace_products=check_count, seed=check_seed)
        if self.trace_products % 2:
            raise ValueError(f"Lanczos(trace_products=...) must be even, as XTrace is; got {self.trace_products}.")

    def spectrum(self, averaged: AveragedCurvature, k: int) -> Spectrum:
        product, size, like = averaged.product(), averaged.space.size, averaged.like
        found = top_of_products(product, like, min(k, size))
        averaged.checked(found[0])
        top = without_zeros(found, size)
        probes = self._probes(product, like, top)
        density = mean_density(probes)
        trace, error = averaged.exact_trace(), 0.0
        diagonal = trace is not None
        if trace is None:
            below, error = xtrace(deflated(product, top), like, self.trace_products, self.seed)
            trace = float(top[0].double().sum()) + below
        known = diagonal and averaged.is_semidefinite
        magnitude = trace if known else density.magnitude()
        sharpness = _largest(product, like, found[0])
        methods = _methods(self, diagonal, known)
        return Spectrum(density, top, sharpness, trace, magnitude, False, methods, probes, error, known)

    def _probes(self, product: Product, like: Tensor, top: Pairs) -> tuple[Density, ...]:
        """For each probe the top pairs, and its quadrature of what is left; where nothing is, the top pairs alone."""
        values, vectors = top
        generator = torch.Generator().manual_seed(int(self.seed))
        left = len(like) - len(values)
        high, once = values.double().cpu(), torch.ones(len(values), dtype=torch.float64)
        probes = []
        for _ in range(self.probes if left else 0):
            start = torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)
            nodes, weights = quadrature(product, start, min(self.steps, left), vectors)
            probes.append(Density(torch.cat([high, nodes]), torch.cat([once, weights * left])))
        return tuple(probes) or (Density(high, once),)


def _methods(options: Lanczos, diagonal: bool, known: bool) -> dict[str, str]:
    """How each quantity was computed."""
    pairs = f"Lanczos iteration to a residual of {TOLERANCE:g}"
    below = f"stochastic Lanczos quadrature, {options.probes} probes of {options.steps} steps"
    return {
        "sharpness": pairs,
        "trace": "exact diagonal" if diagonal else f"XTrace, {options.trace_products} products",
        "numerical_rank": below,
        "effective_rank": below,
        "energy": f"{pairs}, over the exact trace" if known else below,
        "density": below,
        "top": pairs,
    }


def xtrace(product: Product, like: Float[Tensor, "P"], products: int, seed: int) -> tuple[float, float]:
    """tr C by XTrace from that many products, and its standard error; exactly, from P products, where P is no larger.
    Random vectors come from `seed`. `like` is a vector of the size, type and device that `product` takes.

    >>> xtrace(lambda v: torch.arange(4.0) * v, torch.zeros(4), products=30, seed=0)
    (6.0, 0.0)
    """

    def matmat(matrix: Tensor) -> Tensor:
        columns = [product(column.to(like)).to(matrix) for column in matrix.T]
        return torch.stack(columns, dim=1)

    size = len(like)
    if size <= products:
        return float(matmat(torch.eye(size, dtype=torch.float64)).trace()), 0.0
    start = torch.randn(size, products // 2, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64)
    q, r = torch.linalg.qr(matmat(start))
    turned = matmat(q)
    inverse, singular = torch.linalg.inv_ex(r)
    if singular or not inverse.isfinite().all():  # the rank is so low that half of the products span the range of C
        return float((q * turned).sum()), 0.0
    parts = exchangeable_traces(start, q, r, turned, inverse)
    return float(parts.mean()), float(parts.std() / len(parts) ** 0.5) if len(parts) > 1 else math.nan


def exchangeable_traces(
    start: Float[Tensor, "P m"],
    q: Float[Tensor, "P m"],
    r: Float[Tensor, "m m"],
    turned: Float[Tensor, "P m"],
    inverse: Float[Tensor, "m m"],
) -> Float[Tensor, "m"]:
    """m unbiased estimates of tr C: for each column ω of Ω, tr(Q_iᵀ C Q_i) + μᵀ C μ with Q_i an orthonormal basis of
    C Ω without that column, and μ the part of ω outside of it, of squared length P − m + 1 (Epperly et al. 2024,
    section 2.1 and supplement).

    Args: Ω as `start`, C Ω = `q` `r`, C `q` as `turned`, and the `inverse` of `r`.
    """
    size, count = start.shape
    s = inverse.T / inverse.T.norm(dim=0)  # Q s_i is what Q_i lacks of the span of Q
    w, h, t = q.T @ start, q.T @ turned, turned.T @ start
    hw = h @ w
    sw, shs = (s * w).sum(0), (s * (h @ s)).sum(0)
    scale = (size - count + 1) / (start.square().sum(0) - w.square().sum(0) + sw.square())
    inner = (w * hw).sum(0) - (t * w).sum(0) + ((t - h.T @ w) * s).sum(0) * sw + sw.square() * shs
    return h.trace() - shs + scale * (inner + sw * (s * (r - hw)).sum(0))


def _largest(product: Product, like: Tensor, top: Float[Tensor, "k"]) -> float:
    """The largest eigenvalue: that of `top`, the eigenvalues largest in magnitude, where one is positive; else by that
    of C − λ_min I, which has no negative ones."""
    if top.max() > 0 or not top.any():
        return float(top.max())
    lowest = float(top.min())
    return float(top_of_products(lambda v: product(v) - lowest * v, like, 1)[0]) + lowest
