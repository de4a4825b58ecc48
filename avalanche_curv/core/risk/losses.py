"""Criteria in their per-example form ℓ(f, y), with the derivatives in the outputs f that curvature needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.options import ByValue


class ExampleLoss(ABC):
    """The loss ℓ(f, y) of one example, of which a risk takes the mean: what the criterion returns for a batch of one.
    `CrossEntropy` says what becomes of class weights.

    Outputs are [N, C], further axes flattened; targets are as the data give them. Every method treats the N examples
    independently, and where the model is sure, small entries keep their own digits.
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
        """Raises ValueError for outputs (in the model's own shape) or targets that this form does not cover."""


class _Summed(nn.Module):
    reduction = "sum"

    def __init__(self, loss: ExampleLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss.per_example(outputs.reshape(len(outputs), -1), targets).sum()


@singledispatch
def example_loss(criterion: object) -> ExampleLoss:
    """The per-example form of a criterion; the mean or sum that the criterion takes over a batch does not matter.

    Known: `CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`. Add another with `@example_loss.register`.

    >>> example_loss(nn.MSELoss()).per_example(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([5.])
    """
    if isinstance(criterion, ExampleLoss):
        return criterion
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    remedy = MEANT.get(name, "")
    if isinstance(criterion, type):
        remedy = f"Did you mean nn.{name}()?"
    elif not remedy and callable(criterion) and hasattr(criterion, "__name__"):
        remedy = "A function does not say what it does with a batch: give a module, or an ExampleLoss."
    elif not remedy and (criterion is None or isinstance(criterion, str)):
        remedy = "Give an object such as nn.CrossEntropyLoss()."
    own = f"Write one as an ExampleLoss and register it with @example_loss.register({name})."
    raise TypeError(
        f"No per-example form is known for the criterion {name}; expected CrossEntropyLoss, MSELoss or "
        f"BCEWithLogitsLoss. {remedy or own}"
    )


MEANT = {
    "cross_entropy": "Did you mean nn.CrossEntropyLoss()?",
    "mse_loss": "Did you mean nn.MSELoss()?",
    "binary_cross_entropy_with_logits": "Did you mean nn.BCEWithLogitsLoss()?",
    "NLLLoss": "Let the model give logits, without log_softmax, to nn.CrossEntropyLoss().",
    "nll_loss": "Let the model give logits, without log_softmax, to nn.CrossEntropyLoss().",
    "BCELoss": "Let the model give logits, without a sigmoid, to nn.BCEWithLogitsLoss().",
    "binary_cross_entropy": "Let the model give logits, without a sigmoid, to nn.BCEWithLogitsLoss().",
}
"""What is meant by a criterion that has no per-example form here."""


@dataclass(frozen=True, eq=False)
class CrossEntropy(ByValue, ExampleLoss):
    """ℓ = w_y (−log softmax(f)_y), optionally with label smoothing ε, for integer targets.

    The class weights w multiply. Of a criterion that takes means they are w_c / mean(w): torch's mean divides by the
    weights of the batch, and so weights that are all equal train like none, and curve like none here. Of a criterion
    that sums they are as given. A logit of −inf masks its class, which has probability and derivative 0.
    """

    weight: Tensor | None = None
    smoothing: float = 0.0
    ignored: int = -100

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # relative to the largest logit, so that autograd's derivatives of either order keep their digits too
        label, top = targets.long()[:, None], outputs.argmax(1, keepdim=True)
        own, peak = outputs.gather(1, torch.cat([label, top], dim=1)).split(1, dim=1)
        is_top = _one_hot(top[:, 0], outputs)
        others = outputs.masked_fill(is_top, -torch.inf) - peak
        surprise = others.exp().sum(1).log1p()  # −log p of the top class
        loss = surprise - torch.where(label == top, 0.0, own - peak)[:, 0]
        if self.weight is None and self.smoothing == 0:
            return loss
        weight = outputs.new_ones(outputs.shape[1]) if self.weight is None else self.weight.to(outputs)
        if self.smoothing == 0:
            return weight[label[:, 0]] * loss
        spread = surprise * weight.mean() - (weight * others.masked_fill(is_top, 0.0)).mean(1)
        return (1 - self.smoothing) * weight[label[:, 0]] * loss + self.smoothing * spread

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mass, label = self._label_mass(outputs, targets), _one_hot(targets, outputs)
        gradient = mass.sum(1, keepdim=True) * outputs.softmax(1) - mass
        # entries sum to zero; that of the target, p_y − 1, would cancel where the model is sure
        return torch.where(label, -gradient.masked_fill(label, 0.0).sum(1, keepdim=True), gradient)

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = self._label_mass(outputs, targets).sum(1).sqrt()
        return scale[:, None, None] * softmax_covariance_factor(outputs)

    def sample_gradients(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        p, top = outputs.softmax(1), _one_hot(outputs.argmax(1), outputs)
        others = torch.where(top, p.masked_fill(top, 0.0).sum(1, keepdim=True), 1 - p)  # 1 − p with all its digits
        thresholds = p.cumsum(1)[:, None, :-1].contiguous()
        labels = (uniform[:, :, :1] >= thresholds).sum(-1)
        last = ((p > 0) * torch.arange(p.shape[1], device=p.device)).amax(1, keepdim=True)  # p sums to 1 up to rounding
        drawn = _one_hot(labels.minimum(last), outputs)
        return torch.where(drawn, -others[:, None], p[:, None]).transpose(1, 2)

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
            got = tuple(outputs.shape)
            raise ValueError(f"Cross-entropy needs logits of shape [N, C]; got {got}. Reshape them in the model.")
        if targets.ndim != 1 or targets.dtype not in (torch.int64, torch.uint8):
            raise ValueError(
                f"Cross-entropy needs integer class targets of shape [N], int64 or uint8 as for torch in training; got "
                f"{targets.dtype} {tuple(targets.shape)}. Convert integers with .long(); for class probabilities "
                "register an ExampleLoss of your own."
            )
        labels, classes = targets.long(), outputs.shape[1]
        if (labels == self.ignored).any():
            raise ValueError(f"Some targets equal ignore_index={self.ignored}. Drop these examples: means count them.")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"Targets lie in [{int(labels.min())}, {int(labels.max())}] but the model has {classes} "
                "logits. Give the model one logit a class."
            )
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"Got {len(self.weight)} class weights for {classes} logits. Give one weight a class.")

    def _label_mass(self, outputs: Tensor, targets: Tensor) -> Float[Tensor, "N C"]:
        """The weight m_c of −log p_c in the loss: ℓ = Σ_c m_c (−log p_c)."""
        mass = (1 - self.smoothing) * _one_hot(targets, outputs).to(outputs) + self.smoothing / outputs.shape[1]
        return mass if self.weight is None else mass * self.weight.to(outputs)


@dataclass(frozen=True)
class SquaredError(ExampleLoss):
    """ℓ = s Σ_c (f_c − y_c)², with s = 1/C for a criterion that takes means and s = 1 for one that sums."""

    mean: bool = True

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _scale(self.mean, outputs) * (outputs - _matching(targets, outputs)).square().sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * _scale(self.mean, outputs) * (outputs - _matching(targets, outputs))

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        count, width = outputs.shape
        eye = torch.eye(width, dtype=outputs.dtype, device=outputs.device)
        return ((2 * _scale(self.mean, outputs)) ** 0.5 * eye).expand(count, width, width)

    def sample_gradients(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        tiny = torch.finfo(uniform.dtype).eps
        gaussian = torch.special.ndtri(uniform.clamp(tiny, 1 - tiny))
        return (2 * _scale(self.mean, outputs)) ** 0.5 * gaussian.transpose(1, 2)

    def summed(self) -> nn.Module:
        return super().summed() if self.mean else nn.MSELoss(reduction="sum")

    def check_likelihood(self) -> None:
        """exp(−ℓ) is a Gaussian of variance 1/(2s) in each output."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_same_shape("MSELoss", outputs, targets)


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(ByValue, ExampleLoss):
    """ℓ = s Σ_c v_c [w_c y_c softplus(−f_c) + (1 − y_c) softplus(f_c)], for targets in [0, 1]; s as in `SquaredError`.

    `positive_weight` w and `weight` v are 1 where they are None; they broadcast to the outputs of one example as torch
    broadcasts them, and torch's mean does not divide by them.
    """

    mean: bool = True
    positive_weight: Tensor | None = None
    weight: Tensor | None = None

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        off, on = self._weights(outputs, targets)
        return (off * _softplus(outputs) + on * _softplus(-outputs)).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        off, on = self._weights(outputs, targets)
        return off * outputs.sigmoid() - on * (-outputs).sigmoid()

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Tensor:
        off, on = self._weights(outputs, targets)
        return ((off + on) * outputs.sigmoid() * (-outputs).sigmoid()).sqrt().diag_embed()

    def sample_gradients(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        p, q = outputs.sigmoid()[:, None], (-outputs).sigmoid()[:, None]
        return _scale(self.mean, outputs) ** 0.5 * torch.where(uniform < p, -q, p).transpose(1, 2)

    def summed(self) -> nn.Module:
        torchs = nn.BCEWithLogitsLoss(self.weight, pos_weight=self.positive_weight, reduction="sum")
        return super().summed() if self.mean else torchs

    def check_likelihood(self) -> None:
        if self.positive_weight is not None or self.weight is not None:
            raise ValueError(
                "The Fisher information is not defined for BCEWithLogitsLoss with pos_weight or weight, which is no "
                "log-likelihood. Use GGN(), Hessian() or EmpiricalFisher(), or drop pos_weight and weight."
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_same_shape("BCEWithLogitsLoss", outputs, targets)
        if not targets.is_floating_point() or (targets < 0).any() or (targets > 1).any():
            raise ValueError(
                f"BCEWithLogitsLoss needs floating point targets in [0, 1]; got {targets.dtype} from "
                f"{targets.min().item()} to {targets.max().item()}. Convert labels 0 and 1 with .float()."
            )
        for weight in (self.positive_weight, self.weight):
            if weight is not None and not (_broadcasts(weight.shape, outputs.shape[1:]) and (weight >= 0).all()):
                raise ValueError(
                    "Weights of BCEWithLogitsLoss must be at least 0 and broadcast to the outputs of one example, "
                    f"{tuple(outputs.shape[1:])}; got shape {tuple(weight.shape)}. Give one number, or one an output."
                )

    def _weights(self, outputs: Tensor, targets: Tensor) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """s v_c (1 − y_c) and s v_c w_c y_c."""
        y, one = _matching(targets, outputs), outputs.new_ones(1, *targets.shape[1:])
        given = (self.weight, self.positive_weight)
        v, w = ((one if weight is None else weight.to(outputs) * one).reshape(1, -1) for weight in given)
        return _scale(self.mean, outputs) * v * (1 - y), _scale(self.mean, outputs) * v * w * y


def _scale(mean: bool, outputs: Float[Tensor, "N C"]) -> float:
    return 1 / outputs.shape[1] if mean else 1.0


def _one_hot(classes: Tensor, outputs: Float[Tensor, "N C"]) -> Tensor:
    """[..., C], true at the class; `torch.nn.functional.one_hot` takes no uint8."""
    return classes.long()[..., None] == torch.arange(outputs.shape[1], device=outputs.device)


def _matching(targets: Tensor, outputs: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    return targets.reshape(outputs.shape).to(outputs)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ) by operations whose derivatives, of either order, keep their digits at large |x| of either sign."""
    positive = x > 0
    return torch.where(positive, x, 0.0) + torch.where(positive, -x, x).exp().log1p()


def _broadcasts(shape: torch.Size, one: torch.Size) -> bool:
    """Whether a weight of this shape broadcasts to a batch [N, *one] and is the same for every example in it."""
    sizes = zip(reversed(shape), reversed((1, *one)))
    return len(shape) <= len(one) + 1 and all(own in (1, size) for own, size in sizes)


def _check_same_shape(name: str, outputs: Tensor, targets: Tensor) -> None:
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


def _refuse_override(criterion: nn.Module, known: type[nn.Module]) -> None:
    if type(criterion).forward is not known.forward:
        raise TypeError(
            f"{type(criterion).__name__} overrides the forward of {known.__name__}, so it has no per-example form. "
            f"Write it as an ExampleLoss and register it with @example_loss.register({type(criterion).__name__})."
        )


@example_loss.register
def _(criterion: nn.CrossEntropyLoss) -> ExampleLoss:
    _refuse_override(criterion, nn.CrossEntropyLoss)
    weight = _copied(criterion.weight)
    if weight is not None and not ((weight >= 0).all() and 0 < weight.mean() < torch.inf):
        raise ValueError(f"Class weights must be finite, at least 0 and not all 0; got {weight.tolist()}. Scale them.")
    if weight is not None and criterion.reduction == "mean":
        weight = None if (weight == weight[0]).all() else weight / weight.mean()
    return CrossEntropy(weight, criterion.label_smoothing, criterion.ignore_index)


@example_loss.register
def _(criterion: nn.MSELoss) -> ExampleLoss:
    _refuse_override(criterion, nn.MSELoss)
    return SquaredError(criterion.reduction == "mean")


@example_loss.register
def _(criterion: nn.BCEWithLogitsLoss) -> ExampleLoss:
    _refuse_override(criterion, nn.BCEWithLogitsLoss)
    weights = _copied(criterion.pos_weight), _copied(criterion.weight)
    return BinaryCrossEntropy(criterion.reduction == "mean", *weights)


def _copied(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().clone()


def softmax_covariance_factor(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C R"]:
    """An L with L Lᵀ = diag(p) − p pᵀ, p = softmax(logits), of rank R = C − 1, every entry of it with its digits.

    L_kk = √(p_k q_k / q_{k−1}) and L_ik = −(p_i / q_k) L_kk for i > k, with q_k = Σ_{j>k} p_j, where the most probable
    class changes places with the last: then every q_k is at least 1/C, and no entry of L Lᵀ is a difference of larger
    numbers. Source: Tanabe & Sagae (1992), J. R. Statist. Soc. B 54, 211-219.

    >>> L = softmax_covariance_factor(torch.zeros(1, 2))
    >>> (L @ L.mT)[0]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    p, top = logits.softmax(1), logits.argmax(1, keepdim=True)
    classes = torch.arange(p.shape[1], device=p.device)
    order = torch.where(classes == top, classes[-1], classes)  # the swap of the two, which is its own inverse
    order[:, -1:] = top
    in_order = p.gather(1, order)
    from_here = in_order.flip(1).cumsum(1).flip(1)  # q_{k-1}
    after = from_here[:, 1:]  # q_k
    diagonal = (in_order[:, :-1] / from_here[:, :-1] * after).sqrt()
    place, columns = order[:, :, None], classes[:-1]
    factor = p[:, :, None] / -after[:, None, :]
    return factor.masked_fill_(place < columns, 0).masked_fill_(place == columns, 1).mul_(diagonal[:, None, :])
