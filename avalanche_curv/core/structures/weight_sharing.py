"""How Kronecker factors treat the positions at which a layer uses one weight: tokens, pixels, patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.state import Storable


class WeightSharing(Storable, ABC):
    """A reading of the T positions t of example n, with inputs a_nt and sensitivities b_nt: the gradient of the weight,
    Σ_t b_nt a_ntᵀ, is a sum of T products, whose square is no Kronecker product. At T = 1 all readings agree."""

    @abstractmethod
    def inputs(self, a: Float[Tensor, "n in T"], shares: Float[Tensor, "n T"] | None = None) -> Float[Tensor, "m in"]:
        """Rows whose mean outer product is the mean of the first factor over these examples. Where not every position
        counts, `shares` weighs them: T times the share of each in the mean over those of its example."""

    @abstractmethod
    def sensitivities(self, b: Float[Tensor, "n out T"]) -> Float[Tensor, "m out"]:
        """Rows whose outer products add up to the sum of the second factor over these examples."""


@dataclass(frozen=True)
class Expand(WeightSharing):
    """KFAC-expand: each position counts as an example, A = (1 / NT) Σ_{n,t} a_nt a_ntᵀ and
    G = (1 / N) Σ_{n,t} b_nt b_ntᵀ (Eschenhagen et al. 2023, arXiv:2311.00636).

    Exact, with the exact GGN, for deep linear networks whose loss is a sum of squared errors of positions, each of
    which depends on its own input alone (Proposition 1): taggers, next tokens. For convolutions it is the one of
    Grosse & Martens 2016.
    """

    def inputs(self, a: Tensor, shares: Tensor | None = None) -> Tensor:
        rows = a.mT.reshape(-1, a.shape[1])
        return rows if shares is None else rows * shares.sqrt().reshape(-1, 1)

    def sensitivities(self, b: Tensor) -> Tensor:
        return b.mT.reshape(-1, b.shape[1])


@dataclass(frozen=True)
class Reduce(WeightSharing):
    """KFAC-reduce: positions are joined within an example, A = (1 / N) Σ_n ā_n ā_nᵀ of the mean input ā_n = (1 / T) Σ_t
    a_nt, and G = (1 / N) Σ_n (Σ_t b_nt) (Σ_t b_nt)ᵀ (Eschenhagen et al. 2023, arXiv:2311.00636).

    Exact, with the exact GGN, for deep linear networks that take the mean or the sum over positions before a squared
    error (Proposition 2): classifiers of sequences and images. Factors are of N rows instead of N T, which is cheaper.
    """

    def inputs(self, a: Tensor, shares: Tensor | None = None) -> Tensor:
        return a.mean(2) if shares is None else (a @ shares[:, :, None])[:, :, 0] / a.shape[2]

    def sensitivities(self, b: Tensor) -> Tensor:
        return b.sum(2)
