"""The errors of quadratic models of single examples: κ, γ, α and ρ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MEASURES = ("kappa", "kappa_abs", "gamma", "alpha", "rho", "rho_pooled")


@dataclass(frozen=True)
class Fidelity:
    """How far quadratic models of N single examples are from the truth at θ, with displacement δ = θ − a from the
    anchor.

    increase(x) = ½ δᵀ C_x δ, or g_xᵀδ + ½ δᵀ C_x δ where the linear term is kept, with g_x and C_x the gradient and
    curvature of ℓ(x, ·) at the anchor alone.

    - kappa = ℓ(x, θ) − ℓ(x, a) − increase(x): the error of the predicted loss (signed).
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
        """Averages over examples by the names of MEASURES; those of alpha and rho leave out undefined entries.
        `kappa_abs` is the mean of |κ|, `rho_pooled` the ratio of the mean actual to the mean predicted change, which a
        few tiny predictions cannot dominate."""
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
        """The fidelity of consecutive groups of so many examples each."""
        parts = zip(*(t.split(sizes) for t in (self.actual, self.increase, self.gamma, self.alpha)))
        return [Fidelity(*part) for part in parts]


@dataclass(frozen=True)
class Comparison:
    """The fidelity of quadratic models without their linear term, `quadratic`, and with it, `linear`."""

    quadratic: Fidelity
    linear: Fidelity

    @classmethod
    def of(
        cls, products: GradientProducts, actual: Float[Tensor, "N"], increase: Float[Tensor, "2 N"]
    ) -> Comparison:
        """The comparison from inner products of gradients, the `actual` change of each loss and both predicted ones; of
        two predictions the one without the linear term comes first."""
        gamma = products.distance.clamp_min(0).sqrt()
        alpha = _ratio(products.inner, products.true.sqrt() * products.predicted.sqrt()).clamp(-1, 1)
        return cls(*(Fidelity(actual, *parts) for parts in zip(increase, gamma, alpha)))

    def split(self, sizes: list[int]) -> list[Comparison]:
        """The comparison of consecutive groups of so many examples each."""
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
        """Squared norms, inner products and squared distances of the gradients themselves."""
        square = torch.linalg.vecdot
        norm = square(predicted, predicted)
        difference = true - predicted
        return cls(square(true, true).expand_as(norm), norm, square(predicted, true), square(difference, difference))


def concatenated(parts: list[Fidelity]) -> Fidelity:
    """The fidelity of all examples, from that of consecutive groups of them."""
    names = ("actual", "increase", "gamma", "alpha")
    return Fidelity(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, NaN where the denominator is zero up to underflow."""
    tiny = torch.finfo(denominator.dtype).tiny
    return torch.where(denominator.abs() > tiny, numerator / denominator, torch.nan)
