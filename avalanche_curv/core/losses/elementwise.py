"""Losses that are a sum or a mean over outputs, each with a target of its own: regression, counts, yes and no."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor, nn

from avalanche_curv.core.losses.base import ExampleLoss, check_tensor
from avalanche_curv.core.losses.factor import Factor, PerOutput


class Elementwise(ExampleLoss):
    """ℓ = s Σ_c v_c φ(f_c, y_c), with s = 1/K for a criterion that takes means over the K outputs and s = 1 for one
    that sums; v is 1 for most. The curvature in the outputs is diagonal."""

    mean: bool
    name = "The criterion"

    @abstractmethod
    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """φ, differentiable."""

    @abstractmethod
    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        """∂φ/∂f."""

    @abstractmethod
    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        """∂²φ/∂f², at least 0."""

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        """∂φ/∂f at a target drawn from the density exp(−φ), from uniform numbers. Raises TypeError for a loss without
        one, which `check_likelihood` refuses before."""
        raise TypeError(f"{self.name} has no likelihood to draw targets from. Use GGN() or EmpiricalFisher().")

    def information(self, f: Tensor, y: Tensor) -> Tensor:
        """E[(∂φ/∂f)²] over these targets: ∂²φ/∂f² for most densities."""
        return self.bend(f, y)

    def weights(self, outputs: Float[Tensor, "N K"], targets: Tensor) -> Float[Tensor, "1 K"]:
        """v."""
        return outputs.new_ones(1, 1)

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        values = self.weights(outputs, targets) * self.value(outputs, self.matched(targets, outputs))
        return scale(self.mean, outputs) * values.sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        slopes = self.weights(outputs, targets) * self.slope(outputs, self.matched(targets, outputs))
        return scale(self.mean, outputs) * slopes

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Factor:
        bends = self.weights(outputs, targets) * self.bend(outputs, self.matched(targets, outputs))
        return self._diagonal(outputs, bends)

    def fisher_factor(self, outputs: Tensor, targets: Tensor) -> Factor:
        return self._diagonal(outputs, self.information(outputs, self.matched(targets, outputs)))

    def sample_gradients(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        f, y = outputs[:, None].expand_as(uniform), self.matched(targets, outputs)
        drawn = self.drawn(f, y[:, None] if y.ndim == 2 else y[:, :, None], uniform)
        return scale(self.mean, outputs) ** 0.5 * drawn.transpose(1, 2)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_same_shape(self.name, outputs, targets)

    def matched(self, targets: Tensor, outputs: Float[Tensor, "N K"]) -> Tensor:
        """The targets as [N, K], in the type of the outputs."""
        return targets.reshape(outputs.shape).to(outputs)

    def _diagonal(self, outputs: Tensor, bends: Tensor) -> Factor:
        return PerOutput((scale(self.mean, outputs) * bends).sqrt().expand_as(outputs))


@dataclass(frozen=True)
class SquaredError(Elementwise):
    """φ = (f − y)². exp(−φ) is a Gaussian of variance ½."""

    mean: bool = True
    name = "MSELoss"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square()

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return 2 * (f - y)

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return f.new_full((1, 1), 2.0)

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        return 2**0.5 * gaussian(uniform)

    def summed(self, outputs: Tensor, targets: Tensor) -> nn.Module:
        return super().summed(outputs, targets) if self.mean else nn.MSELoss(reduction="sum")

    def check_likelihood(self) -> None:
        """A Gaussian."""


@dataclass(frozen=True)
class AbsoluteError(Elementwise):
    """φ = |f − y|, without curvature where it has one. exp(−φ) is a Laplace density, whose Fisher information is 1."""

    mean: bool = True
    name = "L1Loss"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).abs()

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).sign()

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return f.new_zeros(1, 1)

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        return torch.where(uniform < 0.5, -1.0, 1.0).to(f)

    def information(self, f: Tensor, y: Tensor) -> Tensor:
        return f.new_ones(1, 1)

    def check_likelihood(self) -> None:
        """A Laplace density."""


@dataclass(frozen=True)
class HuberError(Elementwise):
    """φ = h · (½ r² where |r| < δ, δ (|r| − ½ δ) elsewhere), r = f − y: `HuberLoss(delta=δ)` with h = 1, and
    `SmoothL1Loss(beta=δ)` with h = 1/δ."""

    delta: float = 1.0
    height: float = 1.0
    mean: bool = True
    name = "A Huber loss"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        r = f - y
        far = self.delta * (r.abs() - 0.5 * self.delta)
        return self.height * torch.where(r.abs() < self.delta, 0.5 * r.square(), far)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return self.height * (f - y).clamp(-self.delta, self.delta)

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return self.height * ((f - y).abs() < self.delta).to(f)

    def check_likelihood(self) -> None:
        raise no_likelihood(self.name)


@dataclass(frozen=True)
class PoissonError(Elementwise):
    """φ = eᶠ − y f for logarithms f of rates, or f − y log(f + ε) for rates; with Stirling's log y! for y > 1 where
    `full`. exp(−φ) is a Poisson distribution of counts y, up to what does not depend on f."""

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8
    mean: bool = True
    name = "PoissonNLLLoss"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        loss = f.exp() - y * f if self.log_input else f - y * (f + self.eps).log()
        if not self.full:
            return loss
        safe = y.clamp_min(1)
        return loss + torch.where(y > 1, safe * safe.log() - safe + 0.5 * (2 * math.pi * safe).log(), 0.0)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y if self.log_input else 1 - y / (f + self.eps)

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() if self.log_input else y / (f + self.eps).square()

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        inside = uniform.double().clamp(1e-12, 1 - 2.0**-24)
        rate, u = self._rate(f).double().cpu().numpy(), inside.cpu().numpy()
        upper = np.ceil(special.pdtrik(u, rate))
        lower = np.maximum(upper - 1, 0)
        counts = np.where(special.pdtr(lower, rate) >= u, lower, upper)
        return self.slope(f, torch.as_tensor(counts).to(f))

    def information(self, f: Tensor, y: Tensor) -> Tensor:
        if self.log_input:
            return f.exp()
        return (f.clamp_min(0) + self.eps**2) / (f + self.eps).square()

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        super().check(outputs, targets)
        if (targets < 0).any():
            raise ValueError(f"PoissonNLLLoss needs counts of at least 0; got {targets.min().item()}.")
        if not self.log_input and (outputs < 0).any():
            raise ValueError(
                "PoissonNLLLoss(log_input=False) needs rates of at least 0, which these outputs are not. End the model "
                "with softplus, or let it give logarithms of rates to PoissonNLLLoss()."
            )

    def check_likelihood(self) -> None:
        """A Poisson distribution."""

    def _rate(self, f: Tensor) -> Tensor:
        return f.exp() if self.log_input else f


def no_likelihood(name: str) -> ValueError:
    """What is raised for the Fisher information of a loss that is no log-likelihood."""
    return ValueError(
        f"The Fisher information is not defined for {name}, which is no log-likelihood that is known here. Use GGN(), "
        "Hessian() or EmpiricalFisher()."
    )


def gaussian(uniform: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones."""
    tiny = torch.finfo(uniform.dtype).eps
    return torch.special.ndtri(uniform.clamp(tiny, 1 - tiny))


def scale(mean: bool, outputs: Float[Tensor, "N K"]) -> float:
    """s."""
    return 1 / outputs.shape[1] if mean else 1.0


def check_same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless each output has a target."""
    check_tensor(name, targets)
    if outputs.shape != targets.shape:
        classes = not (targets.is_floating_point() or targets.is_complex()) and targets.shape == outputs.shape[:1]
        if classes and outputs.shape[1:].numel() > 1:
            raise ValueError(
                f"{name} needs targets of the outputs' shape {tuple(outputs.shape)}; got classes, {targets.dtype} of "
                f"shape {tuple(targets.shape)}. Classes go with nn.CrossEntropyLoss(); {name} takes them one-hot, as "
                f"by torch.nn.functional.one_hot(targets, {outputs.shape[1]}).float()."
            )
        raise ValueError(
            f"{name} needs targets of the outputs' shape {tuple(outputs.shape)}; got {tuple(targets.shape)}, which "
            "torch broadcasts or refuses. Reshape them where the data are made, as by targets[:, None]."
        )
