"""`GaussianNLLLoss(mean, target, var)` of outputs and targets. Variances stand where they come from:

- *the model predicts them*: outputs hold means and then variances on the second axis, `torch.stack([mean, var], dim=1)`
  or `torch.cat([mean, var], dim=1)`, and targets are as many as the means. A model that returns both is called by
  `forward=lambda model, x: torch.cat(model(x), dim=1)`.
- *the data give them*: outputs are the means, and targets are the pair (target, var), as in `criterion(mean, target,
  var)`, so that batches are (inputs, (target, var)). As for torch, a variance may be one for the last axis of targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.losses.base import ExampleLoss
from avalanche_curv.core.losses.elementwise import Elementwise, gaussian, scale
from avalanche_curv.core.losses.factor import Factor, PerOutput
from avalanche_curv.core.nested import Nested, described


def density(f: Tensor, y: Tensor, v: Tensor, full: bool) -> Tensor:
    """φ = ½ (log v + (f − y)² / v), and ½ log 2π where `full`."""
    return 0.5 * (v.log() + (f - y).square() / v + full * math.log(2 * math.pi))


@dataclass(frozen=True)
class GaussianError(Elementwise):
    """φ = ½ (log v + (f − y)² / v), v at least ε, for targets (y, v). `full` adds ½ log 2π. Where the model predicts v,
    `fitted` gives `GaussianLikelihood`.

    >>> one = GaussianError().per_example(torch.zeros(1, 1), (torch.full((1, 1), 2.0), torch.full((1, 1), 1.0)))
    >>> one  # ½ (log 1 + 2² / 1)
    tensor([2.])
    """

    full: bool = False
    eps: float = 1e-6
    mean: bool = True
    name = "GaussianNLLLoss"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return density(f, y[:, 0], self._variance(y), self.full)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y[:, 0]) / self._variance(y)

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return 1 / self._variance(y)

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        return gaussian(uniform) / self._variance(y).sqrt()

    def matched(self, targets: Nested, outputs: Tensor) -> Float[Tensor, "N 2 K"]:
        target, variance = targets
        if variance.ndim < target.ndim:
            variance = variance[..., None]
        both = torch.stack([target, variance.to(target).expand_as(target)], dim=1)
        return both.reshape(len(outputs), 2, -1).to(outputs)

    def fitted(self, few: Callable[[], tuple[Tensor, Nested]]) -> ExampleLoss:
        _, targets = few()
        return GaussianLikelihood(self.full, self.eps, self.mean) if isinstance(targets, Tensor) else self

    def check(self, outputs: Tensor, targets: Nested) -> None:
        given = isinstance(targets, (tuple, list)) and len(targets) == 2
        shapes = [part.shape if isinstance(part, Tensor) else None for part in targets] if given else [None, None]
        shape = outputs.shape
        if shapes[0] != shape or shapes[1] not in (shape, shape[:-1], (*shape[:-1], 1)) or not (targets[1] >= 0).all():
            raise _misfit(outputs, targets)

    def check_likelihood(self) -> None:
        """A Gaussian."""

    def _variance(self, y: Tensor) -> Tensor:
        return y[:, 1].clamp_min(self.eps)


@dataclass(frozen=True)
class GaussianLikelihood(ExampleLoss):
    """ℓ = s Σ_c φ(f_c, y_c, v_c) of outputs [N, 2K] that are means f and then variances v, at least ε in value: torch's
    derivative in v is that of φ at ε below it, too. s is 1/K for a criterion that takes means, else 1.

    It is not convex in v, and no Gauss-Newton matrix is made of it. The Fisher information in (f, v) is diagonal:
    s / v and s / (2 v²).
    """

    full: bool = False
    eps: float = 1e-6
    mean: bool = True

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, v = self._apart(outputs)
        return scale(self.mean, f) * density(f, targets.reshape(f.shape).to(f), v, self.full).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        f, v = self._apart(outputs)
        return scale(self.mean, f) * _slopes(f - targets.reshape(f.shape).to(f), v)

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Factor:
        raise ValueError(
            "GaussianNLLLoss is not convex in variances that the model predicts, and no Gauss-Newton matrix is made of "
            "it. Use Fisher(), which is known exactly, EmpiricalFisher() or Hessian(psd=Clip())."
        )

    def fisher_factor(self, outputs: Tensor, targets: Tensor) -> Factor:
        f, v = self._apart(outputs)
        return PerOutput((scale(self.mean, f) * torch.cat([1 / v, 0.5 / v.square()], dim=1)).sqrt())

    def draws(self, outputs: Tensor, targets: Tensor) -> int:
        return outputs.shape[1] // 2

    def sample_gradients(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        f, v = self._apart(outputs)
        residuals = gaussian(uniform) * v.sqrt()[:, None]
        return scale(self.mean, f) ** 0.5 * torch.stack([_slopes(r, v) for r in residuals.unbind(1)], dim=2)

    def check_likelihood(self) -> None:
        """A Gaussian."""

    def check(self, outputs: Tensor, targets: Nested) -> None:
        shape = targets.shape if isinstance(targets, Tensor) else torch.Size()
        joined = [(*shape[:1], 2, *shape[1:]), (*shape[:1], 2 * (shape[1:2].numel()), *shape[2:])]
        if tuple(outputs.shape) not in joined or not (outputs.reshape(len(outputs), 2, -1)[:, 1] >= 0).all():
            raise _misfit(outputs, targets)

    def _apart(self, outputs: Float[Tensor, "N 2*K"]) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        f, v = outputs.chunk(2, dim=1)
        return f, v + (v.clamp_min(self.eps) - v).detach()


def _slopes(residual: Float[Tensor, "N K"], variance: Float[Tensor, "N K"]) -> Float[Tensor, "N 2*K"]:
    """∂φ/∂f and then ∂φ/∂v."""
    ratio = residual / variance
    return torch.cat([ratio, 0.5 * (1 / variance - ratio.square())], dim=1)


def _misfit(outputs: Tensor, targets: Nested) -> ValueError:
    return ValueError(
        "GaussianNLLLoss takes targets (target, var) of the outputs' shape, or outputs torch.cat([mean, var], dim=1) "
        "of a model that predicts variances and one tensor of targets, as many as its means; variances of at least 0, "
        f"as by softplus. Got outputs {described(outputs)} and targets {described(targets)}. Put variances of the data "
        "into the batches, (x, (target, var)), and join those of the model by "
        "forward=lambda model, x: torch.cat(model(x), dim=1)."
    )
