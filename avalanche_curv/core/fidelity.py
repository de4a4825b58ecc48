"""How wrong the quadratic picture of each stored example is, at any parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Fidelity:
    """The picture of each of N examples against the truth at θ, with displacement δ = θ − a from its anchor.

    increase(x) = ½ δᵀ C_x δ, or g_xᵀδ + ½ δᵀ C_x δ where the linear term is kept, with g_x and C_x the gradient and
    curvature of ℓ(x, ·) at the anchor alone.

    - kappa = ℓ(x, θ) − ℓ(x, a) − increase(x): the loss that the picture does not see (signed).
    - gamma = ‖∇ℓ(x, θ) − ∇increase(x)‖₂.
    - alpha = cos(∇ℓ(x, θ), ∇increase(x)); NaN where either gradient is zero, as the second is at the anchor.
    - rho = (ℓ(x, θ) − ℓ(x, a)) / increase(x), the trust-region ratio; NaN where nothing is predicted.
    """

    actual: Float[Tensor, "N"]
    increase: Float[Tensor, "N"]
    gamma: Float[Tensor, "N"]
    alpha: Float[Tensor, "N"]

    @property
    def kappa(self) -> Float[Tensor, "N"]:
        return self.actual - self.increase

    @property
    def rho(self) -> Float[Tensor, "N"]:
        return _ratio(self.actual, self.increase)

    def means(self) -> dict[str, float]:
        """Averages over examples; those of alpha and rho leave out undefined entries. `rho_pooled` is the ratio of
        the mean actual to the mean predicted change, which a few tiny predictions cannot dominate."""
        return {
            "kappa": self.kappa.mean().item(),
            "kappa_abs": self.kappa.abs().mean().item(),
            "gamma": self.gamma.mean().item(),
            "alpha": self.alpha.nanmean().item(),
            "rho": self.rho.nanmean().item(),
            "rho_pooled": _ratio(self.actual.mean(), self.increase.mean()).item(),
        }

    def select(self, mask: Tensor) -> Fidelity:
        """The fidelity of some of the examples."""
        return Fidelity(self.actual[mask], self.increase[mask], self.gamma[mask], self.alpha[mask])


@dataclass(frozen=True)
class Comparison:
    """The fidelity of the same pictures without and with their linear term."""

    quadratic: Fidelity
    linear: Fidelity


@dataclass(frozen=True)
class GradientProducts:
    """Inner products of the true gradient ∇ℓ with a predicted one, for each of N examples."""

    true: Float[Tensor, "N"]
    predicted: Float[Tensor, "N"]
    inner: Float[Tensor, "N"]
    distance: Float[Tensor, "N"]

    @classmethod
    def of(cls, true: Float[Tensor, "N P"], predicted: Float[Tensor, "N P"]) -> GradientProducts:
        """From the gradients themselves: squared norms, inner product and squared distance."""
        return cls(
            true.square().sum(1), predicted.square().sum(1), (true * predicted).sum(1),
            (true - predicted).square().sum(1),
        )

    def fidelity(self, actual: Float[Tensor, "N"], increase: Float[Tensor, "N"]) -> Fidelity:
        """The four measures of this prediction."""
        alpha = _ratio(self.inner, self.true.sqrt() * self.predicted.sqrt()).clamp(-1, 1)
        return Fidelity(actual, increase, self.distance.clamp_min(0).sqrt(), alpha)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, NaN where the denominator is zero up to underflow."""
    tiny = torch.finfo(denominator.dtype).tiny
    return torch.where(denominator.abs() > tiny, numerator / denominator, torch.nan)
