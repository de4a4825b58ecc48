"""How wrong the quadratic picture of each stored example is, at any parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MEASURES = ("kappa", "kappa_abs", "gamma", "alpha", "rho", "rho_pooled")


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
        values = torch.stack([
            self.kappa.mean(),
            self.kappa.abs().mean(),
            self.gamma.mean(),
            self.alpha.nanmean(),
            self.rho.nanmean(),
            _ratio(self.actual.mean(), self.increase.mean()),
        ])
        return dict(zip(MEASURES, values.tolist()))

    def split(self, sizes: list[int]) -> list[Fidelity]:
        """The fidelity of consecutive groups of examples."""
        parts = zip(*(t.split(sizes) for t in (self.actual, self.increase, self.gamma, self.alpha)))
        return [Fidelity(*part) for part in parts]


@dataclass(frozen=True)
class Comparison:
    """The fidelity of the same pictures without and with their linear term."""

    quadratic: Fidelity
    linear: Fidelity

    @classmethod
    def of(
        cls, products: GradientProducts, actual: Float[Tensor, "N"], increase: Float[Tensor, "2 N"]
    ) -> Comparison:
        """From both predictions at once, the one without the linear term first."""
        gamma = products.distance.clamp_min(0).sqrt()
        alpha = _ratio(products.inner, products.true.sqrt() * products.predicted.sqrt()).clamp(-1, 1)
        return cls(*(Fidelity(actual, *parts) for parts in zip(increase, gamma, alpha)))

    def split(self, sizes: list[int]) -> list[Comparison]:
        """The comparison of consecutive groups of examples."""
        return [Comparison(*pair) for pair in zip(self.quadratic.split(sizes), self.linear.split(sizes))]


@dataclass(frozen=True)
class GradientProducts:
    """Inner products of the true gradient ∇ℓ with two predicted ones, for each of N examples."""

    true: Float[Tensor, "2 N"]
    predicted: Float[Tensor, "2 N"]
    inner: Float[Tensor, "2 N"]
    distance: Float[Tensor, "2 N"]

    @classmethod
    def of(cls, true: Float[Tensor, "N P"], predicted: Float[Tensor, "2 N P"]) -> GradientProducts:
        """From the gradients themselves: squared norms, inner product and squared distance."""
        square = torch.linalg.vecdot
        norm = square(predicted, predicted)
        difference = true - predicted
        return cls(square(true, true).expand_as(norm), norm, square(predicted, true), square(difference, difference))


def concatenated(parts: list[Fidelity]) -> Fidelity:
    """The fidelity of all examples from that of their groups."""
    names = ("actual", "increase", "gamma", "alpha")
    return Fidelity(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, NaN where the denominator is zero up to underflow."""
    tiny = torch.finfo(denominator.dtype).tiny
    return torch.where(denominator.abs() > tiny, numerator / denominator, torch.nan)
