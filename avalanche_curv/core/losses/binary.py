"""Losses of yes and no: of logits, of probabilities, and of signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.losses.base import ExampleLoss
from avalanche_curv.core.losses.elementwise import Elementwise, check_same_shape, scale
from avalanche_curv.core.losses.factor import Factor, PerOutput
from avalanche_curv.core.options import ByValue


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(ByValue, ExampleLoss):
    """ℓ = s Σ_c v_c [w_c y_c softplus(−f_c) + (1 − y_c) softplus(f_c)], for targets in [0, 1]; s as in `Elementwise`.

    `positive_weight` w and `weight` v are 1 where they are None; they broadcast to the outputs of one example as torch
    broadcasts them, and torch's mean does not divide by them. `MultiLabelSoftMarginLoss` is the same under a mean.
    """

    mean: bool = True
    positive_weight: Tensor | None = None
    weight: Tensor | None = None
    name: str = "BCEWithLogitsLoss"

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        off, on = self._weights(outputs, targets)
        return (off * softplus(outputs) + on * softplus(-outputs)).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        off, on = self._weights(outputs, targets)
        return off * outputs.sigmoid() - on * (-outputs).sigmoid()

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Factor:
        off, on = self._weights(outputs, targets)
        return PerOutput(((off + on) * outputs.sigmoid() * (-outputs).sigmoid()).sqrt())

    def sample_gradients(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        p, q = outputs.sigmoid()[:, None], (-outputs).sigmoid()[:, None]
        return scale(self.mean, outputs) ** 0.5 * torch.where(uniform < p, -q, p).transpose(1, 2)

    def summed(self, outputs: Tensor, targets: Tensor) -> nn.Module:
        torchs = nn.BCEWithLogitsLoss(self.weight, pos_weight=self.positive_weight, reduction="sum")
        return super().summed(outputs, targets) if self.mean else torchs

    def check_likelihood(self) -> None:
        if self.positive_weight is not None or self.weight is not None:
            raise weighted(self.name, "pos_weight or weight")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_same_shape(self.name, outputs, targets)
        check_unit(self.name, targets)
        for weight in (self.positive_weight, self.weight):
            check_weight(self.name, weight, outputs)

    def _weights(self, outputs: Tensor, targets: Tensor) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """s v_c (1 − y_c) and s v_c w_c y_c."""
        y = targets.reshape(outputs.shape).to(outputs)
        given = (self.weight, self.positive_weight)
        v, w = (spread(weight, outputs, targets) for weight in given)
        return scale(self.mean, outputs) * v * (1 - y), scale(self.mean, outputs) * v * w * y


@dataclass(frozen=True, eq=False)
class Bernoulli(ByValue, Elementwise):
    """φ = −v [y log p + (1 − y) log(1 − p)] for outputs p that are probabilities, logarithms at least −100: `BCELoss`.

    The Gauss-Newton matrix is that of φ in p, y/p² + (1 − y)/(1 − p)², and the Fisher information 1/(p (1 − p)) is that
    of the logits, carried over. Of logits in `BCEWithLogitsLoss` the two are one.
    """

    mean: bool = True
    weight: Tensor | None = None
    name = "BCELoss"

    def weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return spread(self.weight, outputs, targets)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return -(y * f.log().clamp_min(-100) + (1 - y) * (-f).log1p().clamp_min(-100))

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y) / (f * (1 - f)).clamp_min(1e-12)

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return y / f.square() + (1 - y) / (1 - f).square()

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        return self.slope(f, (uniform < f).to(f))

    def information(self, f: Tensor, y: Tensor) -> Tensor:
        return 1 / (f * (1 - f))

    def check_likelihood(self) -> None:
        if self.weight is not None:
            raise weighted(self.name, "weight")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_same_shape(self.name, outputs, targets)
        check_unit(self.name, targets)
        check_weight(self.name, self.weight, outputs)
        if not ((outputs >= 0) & (outputs <= 1)).all():
            raise ValueError(
                "BCELoss needs outputs in [0, 1], which these are not. End the model with a sigmoid, or give its "
                "logits to nn.BCEWithLogitsLoss()."
            )


@dataclass(frozen=True)
class SoftMargin(Elementwise):
    """φ = log(1 + exp(−y f)) for y = 1 and y = −1: the binary cross-entropy of signs."""

    mean: bool = True
    name = "SoftMarginLoss"

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return softplus(-y * f)

    def slope(self, f: Tensor, y: Tensor) -> Tensor:
        return -y * (-y * f).sigmoid()

    def bend(self, f: Tensor, y: Tensor) -> Tensor:
        return f.sigmoid() * (-f).sigmoid()

    def drawn(self, f: Tensor, y: Tensor, uniform: Tensor) -> Tensor:
        return self.slope(f, torch.where(uniform < f.sigmoid(), 1.0, -1.0).to(f))

    def check_likelihood(self) -> None:
        """A Bernoulli distribution."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        super().check(outputs, targets)
        if not (targets.abs() == 1).all():
            raise ValueError("SoftMarginLoss needs targets 1 and -1. Convert labels 0 and 1 by 2 * targets - 1.")


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) by operations whose derivatives, of either order, keep their digits at large |x| of either sign."""
    positive = x > 0
    return torch.where(positive, x, 0.0) + torch.where(positive, -x, x).exp().log1p()


def spread(weight: Tensor | None, outputs: Float[Tensor, "N K"], targets: Tensor) -> Float[Tensor, "1 K"]:
    """A weight of one example's outputs as a row, as torch broadcasts it; 1 for None."""
    one = outputs.new_ones(1, *targets.shape[1:])
    return (one if weight is None else weight.to(outputs) * one).reshape(1, -1)


def weighted(name: str, options: str) -> ValueError:
    """What is raised for the Fisher information of a weighted loss."""
    return ValueError(
        f"The Fisher information is not defined for {name} with {options}, which is no log-likelihood. Use GGN(), "
        f"Hessian() or EmpiricalFisher(), or drop {options.replace(' or ', ' and ')}."
    )


def check_unit(name: str, targets: Tensor) -> None:
    """Raises ValueError unless targets are numbers in [0, 1]."""
    if not targets.is_floating_point() or (targets < 0).any() or (targets > 1).any():
        raise ValueError(
            f"{name} needs floating point targets in [0, 1]; got {targets.dtype} from "
            f"{targets.min().item()} to {targets.max().item()}. Convert labels 0 and 1 with .float()."
        )


def check_weight(name: str, weight: Tensor | None, outputs: Tensor) -> None:
    """Raises ValueError unless a weight is the same for every example."""
    if weight is not None and not (_broadcasts(weight.shape, outputs.shape[1:]) and (weight >= 0).all()):
        raise ValueError(
            f"Weights of {name} must be at least 0 and broadcast to the outputs of one example, "
            f"{tuple(outputs.shape[1:])}; got shape {tuple(weight.shape)}. Give one number, or one an output."
        )


def _broadcasts(shape: torch.Size, one: torch.Size) -> bool:
    """Whether a weight of this shape broadcasts to a batch [N, *one] and is the same for every example in it."""
    sizes = zip(reversed(shape), reversed((1, *one)))
    return len(shape) <= len(one) + 1 and all(own in (1, size) for own, size in sizes)
