"""Criteria in their per-example form ℓ(f, y), with the derivatives in the outputs f that curvature needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv.core.options import ByValue


class ExampleLoss(ABC):
    """The loss ℓ(f, y) of one example: what the criterion returns for a batch of one, class weights kept.

    Outputs are [N, C]; every method treats the N examples independently.
    """

    @abstractmethod
    def per_example(self, outputs: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, "N"]:
        """ℓ(f_i, y_i), differentiable."""

    @abstractmethod
    def gradient(self, outputs: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, "N C"]:
        """∇_f ℓ(f_i, y_i)."""

    @abstractmethod
    def hessian_factor(self, outputs: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, "N C R"]:
        """S_i with S_i S_iᵀ = ∇²_f ℓ(f_i, y_i)."""

    @abstractmethod
    def sample_gradients(
        self, outputs: Float[Tensor, "N C"], uniform: Float[Tensor, "N m C"]
    ) -> Float[Tensor, "N C m"]:
        """∇_f ℓ(f_i, y) at labels y of the model itself, E[g gᵀ] = ∇²_f ℓ, from uniform draws in [0, 1)."""

    def summed(self) -> nn.Module:
        """Σ_i ℓ_i as a criterion with `reduction="sum"`: torch's own where there is one of the same value, for
        libraries that look at its type."""
        return _Summed(self)

    @abstractmethod
    def check_likelihood(self) -> None:
        """Raises ValueError where exp(-ℓ) is no likelihood, so that a Fisher information is not defined."""

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raises ValueError for outputs or targets that this form does not cover."""


class _Summed(nn.Module):
    reduction = "sum"

    def __init__(self, loss: ExampleLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.per_example(outputs, targets).sum()


@singledispatch
def example_loss(criterion: object) -> ExampleLoss:
    """The per-example form of a criterion; the mean or sum that the criterion takes over a batch does not matter.

    Known: `CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`. Add another with `@example_loss.register`.

    >>> example_loss(nn.MSELoss()).per_example(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([5.])
    """
    if isinstance(criterion, ExampleLoss):
        return criterion
    raise TypeError(
        f"No per-example form is known for the criterion {type(criterion).__name__}; expected CrossEntropyLoss, "
        "MSELoss or BCEWithLogitsLoss. Write one as an ExampleLoss and register it with "
        f"@example_loss.register({type(criterion).__name__})."
    )


@dataclass(frozen=True, eq=False)
class CrossEntropy(ByValue, ExampleLoss):
    """ℓ = w_y (−log softmax(f)_y), optionally with label smoothing ε, for integer targets."""

    weight: Tensor | None = None
    smoothing: float = 0.0
    ignored: int = -100

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(outputs)
        return F.cross_entropy(outputs, targets, weight=weight, label_smoothing=self.smoothing, reduction="none")

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mass = self._label_mass(outputs, targets)
        gradient = mass.sum(1, keepdim=True) * outputs.softmax(1) - mass
        # entries sum to zero; that of the target, p_y − 1, would cancel where the model is sure
        others = gradient.scatter(1, targets[:, None], 0.0).sum(1, keepdim=True)
        return gradient.scatter(1, targets[:, None], -others)

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = self._label_mass(outputs, targets).sum(1).sqrt()
        return scale[:, None, None] * softmax_covariance_factor(outputs)

    def sample_gradients(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        probabilities = outputs.softmax(1)
        thresholds = probabilities.cumsum(1)[:, None, :-1].contiguous()
        labels = (uniform[:, :, :1] >= thresholds).sum(-1)
        return (probabilities[:, None] - F.one_hot(labels, outputs.shape[1])).transpose(1, 2)

    def summed(self) -> nn.Module:
        return nn.CrossEntropyLoss(self.weight, label_smoothing=self.smoothing, reduction="sum")

    def check_likelihood(self) -> None:
        if self.weight is not None:
            raise ValueError(
                "The Fisher information is not defined for class-weighted cross-entropy, which is no log-likelihood. "
                "Use GGN(), Hessian() or EmpiricalFisher(), or drop the class weights."
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2:
            raise ValueError(f"Cross-entropy needs logits of shape [N, C]; got {tuple(outputs.shape)}.")
        if targets.ndim != 1 or targets.is_floating_point():
            raise ValueError(
                f"Cross-entropy needs integer class targets of shape [N]; got {targets.dtype} {tuple(targets.shape)}. "
                "For class probabilities register an ExampleLoss of your own."
            )
        if (targets == self.ignored).any():
            raise ValueError(
                f"Some targets equal ignore_index={self.ignored}: a mean over examples would count them. "
                "Drop these examples before estimating curvature."
            )
        if targets.min() < 0 or targets.max() >= outputs.shape[1]:
            raise ValueError(
                f"Targets lie in [{int(targets.min())}, {int(targets.max())}] but the model has {outputs.shape[1]} "
                "logits. Give the model one logit a class."
            )

    def _label_mass(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "N C"]:
        """The weight m_c of −log p_c in the loss: ℓ = Σ_c m_c (−log p_c)."""
        classes = outputs.shape[1]
        mass = (1 - self.smoothing) * F.one_hot(targets, classes).to(outputs) + self.smoothing / classes
        return mass if self.weight is None else mass * self.weight.to(outputs)


@dataclass(frozen=True)
class SquaredError(ExampleLoss):
    """ℓ = s Σ_c (f_c − y_c)², with s = 1/C for a criterion that takes means and s = 1 for one that sums."""

    mean: bool = True

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._scale(outputs) * (outputs - targets.reshape(outputs.shape)).square().sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * self._scale(outputs) * (outputs - targets.reshape(outputs.shape))

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count, width = outputs.shape
        eye = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
        return ((2 * self._scale(outputs)) ** 0.5 * eye).expand(count, width, width)

    def sample_gradients(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        tiny = torch.finfo(uniform.dtype).eps
        gaussian = torch.special.ndtri(uniform.clamp(tiny, 1 - tiny))
        return (2 * self._scale(outputs)) ** 0.5 * gaussian.transpose(1, 2)

    def summed(self) -> nn.Module:
        return super().summed() if self.mean else nn.MSELoss(reduction="sum")

    def check_likelihood(self) -> None:
        """exp(−ℓ) is a Gaussian of variance 1/(2s) in each output."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_same_size("MSELoss", outputs, targets)

    def _scale(self, outputs: Tensor) -> float:
        return 1 / outputs.shape[1] if self.mean else 1.0


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(ByValue, ExampleLoss):
    """ℓ = s Σ_c [softplus(f_c) − y_c f_c], positives weighted by `positive_weight`; s as in `SquaredError`."""

    mean: bool = True
    positive_weight: Tensor | None = None

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(
            outputs, targets.reshape(outputs.shape).to(outputs), pos_weight=self.positive_weight, reduction="none"
        )
        return loss.mean(1) if self.mean else loss.sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        y, weight = self._labels_and_weights(outputs, targets)
        return self._scale(outputs) * ((1 - y) - weight * (-outputs).sigmoid())

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _, weight = self._labels_and_weights(outputs, targets)
        p = outputs.sigmoid()
        return (self._scale(outputs) * weight * p * (1 - p)).sqrt().diag_embed()

    def sample_gradients(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        p = outputs.sigmoid()[:, None]
        return self._scale(outputs) ** 0.5 * (p - (uniform < p).to(outputs)).transpose(1, 2)

    def summed(self) -> nn.Module:
        return super().summed() if self.mean else nn.BCEWithLogitsLoss(pos_weight=self.positive_weight, reduction="sum")

    def check_likelihood(self) -> None:
        if self.positive_weight is not None:
            raise ValueError(
                "The Fisher information is not defined for BCEWithLogitsLoss with pos_weight, which is no "
                "log-likelihood. Use GGN(), Hessian() or EmpiricalFisher(), or drop pos_weight."
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_same_size("BCEWithLogitsLoss", outputs, targets)

    def _labels_and_weights(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        y = targets.reshape(outputs.shape).to(outputs)
        extra = 0.0 if self.positive_weight is None else self.positive_weight.to(outputs) - 1
        return y, 1 + extra * y

    def _scale(self, outputs: Tensor) -> float:
        return 1 / outputs.shape[1] if self.mean else 1.0


def _check_same_size(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.numel() != targets.numel():
        raise ValueError(
            f"{name} needs targets of the outputs' shape {tuple(outputs.shape)}; got {tuple(targets.shape)}."
        )


def _refuse_override(criterion: nn.Module, known: type[nn.Module]) -> None:
    if type(criterion).forward is not known.forward:
        raise TypeError(
            f"{type(criterion).__name__} overrides the forward of {known.__name__}, so no per-example form of it is "
            "known. Write it as an ExampleLoss and register it with "
            f"@example_loss.register({type(criterion).__name__})."
        )


def _takes_mean(criterion: nn.Module) -> bool:
    return criterion.reduction == "mean"


@example_loss.register
def _(criterion: nn.CrossEntropyLoss) -> ExampleLoss:
    _refuse_override(criterion, nn.CrossEntropyLoss)
    return CrossEntropy(criterion.weight, criterion.label_smoothing, criterion.ignore_index)


@example_loss.register
def _(criterion: nn.MSELoss) -> ExampleLoss:
    _refuse_override(criterion, nn.MSELoss)
    return SquaredError(_takes_mean(criterion))


@example_loss.register
def _(criterion: nn.BCEWithLogitsLoss) -> ExampleLoss:
    _refuse_override(criterion, nn.BCEWithLogitsLoss)
    if criterion.weight is not None:
        raise ValueError("BCEWithLogitsLoss(weight=...) has no per-example form here; use pos_weight or drop it.")
    return BinaryCrossEntropy(_takes_mean(criterion), criterion.pos_weight)


def softmax_covariance_factor(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C R"]:
    """The lower triangular L with L Lᵀ = diag(p) − p pᵀ, p = softmax(logits), of rank R = C − 1.

    L_kk = √(p_k q_k / q_{k−1}) and L_ik = −(p_i / q_k) L_kk for i > k, with q_k = Σ_{j>k} p_j.
    Source: Tanabe & Sagae (1992), J. R. Statist. Soc. B 54, 211-219.

    >>> L = softmax_covariance_factor(torch.zeros(1, 2))
    >>> (L @ L.mT)[0]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    p = logits.softmax(1)
    tiny = torch.finfo(p.dtype).tiny
    from_here = p.flip(1).cumsum(1).flip(1).clamp_min(tiny)  # q_{k-1}
    after = from_here[:, 1:]  # q_k
    diagonal = (p[:, :-1] / from_here[:, :-1] * after).sqrt()
    ratio = p[:, :, None] / after[:, None, :]
    below = torch.ones(p.shape[1], p.shape[1] - 1, dtype=torch.bool, device=p.device).tril(-1)
    factor = torch.where(below, -ratio, torch.zeros_like(ratio))
    factor.diagonal(dim1=1, dim2=2).fill_(1)
    return factor * diagonal[:, None, :]
