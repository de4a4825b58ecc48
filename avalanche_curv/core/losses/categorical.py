"""Losses of probabilities of classes: cross-entropy, of examples, tokens and pixels, and what equals it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from avalanche_curv.core.losses.base import ExampleLoss, check_tensor
from avalanche_curv.core.losses.factor import Columns, Factor, PerToken, Softmax, Tokens
from avalanche_curv.core.options import ByValue

NORMALISED = 1e-3  # how far probabilities may sum up to something else than 1


class Mass(NamedTuple):
    """M tokens with ℓ = Σ_c m_c (−log softmax(z)_c): their logits, the mass m, and of each the class whose entry of
    `gradient` is left to the others (see `_balanced`)."""

    tokens: Tokens
    logits: Float[Tensor, "M C"]
    mass: Float[Tensor, "M C"]
    pivot: Int[Tensor, "M"]

    def values(self) -> Float[Tensor, "N"]:
        """Σ over the tokens of each example, with derivatives of either order that keep their digits."""
        surprise, others = _surprise(self.logits)
        apart = torch.where(self.mass > 0, self.mass * others, 0.0).sum(1)
        return _sum(self.tokens, self.mass.sum(1) * surprise - apart)

    def gradient(self) -> Float[Tensor, "N K"]:
        """∇_f ℓ."""
        gradient = self.mass.sum(1, keepdim=True) * self.logits.softmax(1) - self.mass
        return self.tokens.together(_balanced(gradient, self.pivot))

    def factor(self) -> Factor:
        """S with S Sᵀ = ∇²_f ℓ, block by block for each token."""
        return _factor(self.tokens, self.logits, self.mass.sum(1))

    def sample_gradients(self, uniform: Float[Tensor, "N m draws"]) -> Float[Tensor, "N K m"]:
        """√(Σ_c m_c) (p − e_y) of each token, y ~ p, each from a uniform number of its own."""
        return _sampled(self.tokens, self.logits, self.mass.sum(1), uniform)


class MassOfOne(NamedTuple):
    """A `Mass` that lies in one class of each token: its logits, m and the class. It reads the logits fewer times."""

    tokens: Tokens
    logits: Float[Tensor, "M C"]
    mass: Float[Tensor, "M"]
    label: Int[Tensor, "M"]

    def values(self) -> Float[Tensor, "N"]:
        """Σ over the tokens of each example, with derivatives of either order that keep their digits."""
        own, top = self.label[:, None], self.logits.argmax(1, keepdim=True)
        here, peak = self.logits.gather(1, torch.cat([own, top], dim=1)).split(1, dim=1)
        is_top = _one_hot(top[:, 0], self.logits)
        rest = (self.logits.masked_fill(is_top, -torch.inf) - peak).exp().sum(1).log1p()
        loss = rest - torch.where(own == top, 0.0, here - peak)[:, 0]
        return _sum(self.tokens, torch.where(self.mass > 0, self.mass * loss, 0.0))

    def gradient(self) -> Float[Tensor, "N K"]:
        """∇_f ℓ."""
        return self.tokens.together(_balanced(self.mass[:, None] * self.logits.softmax(1), self.label))

    def factor(self) -> Factor:
        """S with S Sᵀ = ∇²_f ℓ, block by block for each token."""
        return _factor(self.tokens, self.logits, self.mass)

    def sample_gradients(self, uniform: Float[Tensor, "N m draws"]) -> Float[Tensor, "N K m"]:
        """√m (p − e_y) of each token, y ~ p, each from a uniform number of its own."""
        return _sampled(self.tokens, self.logits, self.mass, uniform)


def _factor(tokens: Tokens, logits: Float[Tensor, "M C"], mass: Float[Tensor, "M"]) -> Factor:
    alone = logits.shape[1] == 1  # a class that is always certain
    inner = Columns(torch.zeros_like(logits)[:, :, None]) if alone else Softmax.of(logits, mass)
    return inner if tokens.count == 1 else PerToken(inner, tokens, logits.shape[1])


def _sampled(
    tokens: Tokens, logits: Float[Tensor, "M C"], mass: Float[Tensor, "M"], uniform: Float[Tensor, "N m draws"]
) -> Float[Tensor, "N K m"]:
    p, root = logits.softmax(1), mass.sqrt()[:, None]
    drawn = uniform[:, :, : tokens.count].transpose(1, 2).reshape(len(p), -1).contiguous()
    labels = torch.searchsorted(p.cumsum(1), drawn, right=True).clamp_(max=p.shape[1] - 1)
    if not (p.gather(1, labels) > 0).all():  # p sums to 1 up to rounding
        last = ((p > 0) * torch.arange(p.shape[1], device=p.device)).amax(1, keepdim=True)
        labels = labels.minimum(last)
    columns = [tokens.together(_balanced(p, label).mul_(root)) for label in labels.unbind(1)]
    return columns[0].unsqueeze(2) if len(columns) == 1 else torch.stack(columns, dim=2)


def _balanced(rows: Float[Tensor, "M C"], pivot: Int[Tensor, "M"]) -> Float[Tensor, "M C"]:
    """The rows with −Σ of the other entries at the pivot of each: rows of derivatives in logits sum to zero, and the
    entry of the class that the model is sure of would cancel.

    >>> _balanced(torch.tensor([[0.25, 0.5, 0.25]]), torch.tensor([1]))
    tensor([[ 0.2500, -0.5000,  0.2500]])
    """
    place = pivot[:, None]
    others = rows.scatter(1, place, 0.0)
    return others.scatter_(1, place, -others.sum(1, keepdim=True))


def _surprise(logits: Float[Tensor, "M C"]) -> tuple[Float[Tensor, "M"], Float[Tensor, "M C"]]:
    """−log p of the most probable class, and the other logits less its own, 0 at its place: so that autograd's
    derivatives keep their digits too."""
    top = logits.argmax(1, keepdim=True)
    others = logits - logits.gather(1, top)
    is_top = _one_hot(top[:, 0], logits)
    return others.masked_fill(is_top, -torch.inf).exp().sum(1).log1p(), others.masked_fill(is_top, 0.0)


def _sum(tokens: Tokens, values: Float[Tensor, "M"]) -> Float[Tensor, "N"]:
    return values if tokens.count == 1 else values.view(-1, tokens.count).sum(1)


def _one_hot(classes: Tensor, logits: Float[Tensor, "M C"]) -> Tensor:
    """[..., C], true at the class; `torch.nn.functional.one_hot` takes no uint8."""
    return classes.long()[..., None] == torch.arange(logits.shape[1], device=logits.device)


class OfClasses(ExampleLoss):
    """A loss with the derivatives of Σ_c m_c (−log softmax(z)_c), token by token."""

    @abstractmethod
    def mass(self, outputs: Float[Tensor, "N K"], targets: Tensor) -> Mass | MassOfOne:
        """The tokens z and m."""

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mass(outputs, targets).gradient()

    def hessian_factor(self, outputs: Tensor, targets: Tensor) -> Factor:
        return self.mass(outputs, targets).factor()

    def sample_gradients(self, outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
        return self.mass(outputs, targets).sample_gradients(uniform)


@dataclass(frozen=True, eq=False)
class CrossEntropy(ByValue, OfClasses):
    """ℓ = w_y (−log softmax(f)_y), optionally with label smoothing ε, for integer classes, one for each example or one
    for each token; and ℓ = Σ_c w_c y_c (−log softmax(f)_c) for probabilities y of classes.

    Outputs are [N, C] or [N, C, d1, ...]. Tokens: under a mean ℓ = Σ_t w_{y_t} (−log p_t) / Σ_t w_{y_t} over the tokens
    of the example whose target is not `ignored`; probabilities of classes are averaged over all tokens; sums otherwise.

    With one class for each example the class weights w multiply. Of a criterion that takes means they are
    w_c / mean(w): torch's mean divides by the weights of the batch, and so weights that are all equal train like none,
    and curve like none here. Of a criterion that sums, and for probabilities of classes, they are as given. A logit of
    −inf masks its class, which has probability and derivative 0.
    """

    weight: Tensor | None = None
    smoothing: float = 0.0
    ignored: int = -100
    mean: bool = True

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.mass(outputs, targets).values()

    def draws(self, outputs: Tensor, targets: Tensor) -> int:
        tokens = self._tokens(targets).count
        return tokens if tokens > 1 else outputs.shape[1]

    def counted(self, targets: Tensor) -> Bool[Tensor, "N ..."] | None:
        return None if targets.is_floating_point() else targets.long() != self.ignored

    def summed(self, outputs: Tensor, targets: Tensor) -> nn.Module:
        if outputs.ndim > 2 or (self.weight is not None and targets.is_floating_point()):
            return super().summed(outputs, targets)
        weight = None if self.weight is None else self._weights(self.weight, self.weight, targets)
        return nn.CrossEntropyLoss(
            weight, ignore_index=self.ignored, label_smoothing=self.smoothing, reduction="sum"
        )

    def check_likelihood(self) -> None:
        if self.weight is not None and not (self.mean and (self.weight == self.weight[0]).all()):
            raise ValueError(
                "The Fisher information is not defined for class-weighted cross-entropy, which is no log-likelihood. "
                "Use GGN(), Hessian() or EmpiricalFisher(), or drop the class weights."
            )

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_tensor("Cross-entropy", targets)
        got = tuple(outputs.shape)
        if outputs.ndim < 2:
            raise ValueError(
                f"Cross-entropy needs logits of shape [N, C] or [N, C, d1, ...]; got {got}. Reshape them in the model."
            )
        classes = outputs.shape[1]
        if self.weight is not None and self.weight.shape != (classes,):
            raise ValueError(f"Got {len(self.weight)} class weights for {classes} logits. Give one weight a class.")
        if targets.is_floating_point() and targets.shape == outputs.shape:
            if not (targets >= 0).all():
                raise ValueError("Probabilities of classes must be at least 0. Give them, not logits: y.softmax(1).")
            return
        wanted = (len(outputs), *outputs.shape[2:])
        if targets.shape != wanted or targets.dtype not in (torch.int64, torch.uint8):
            last = targets.shape == outputs.shape[:-1] and outputs.ndim > 2
            axes = (
                "Put classes on the second axis, as by logits.transpose(1, 2); where targets are next tokens, take "
                "logits[:, :-1].transpose(1, 2) and targets[:, 1:]. "
            )
            raise ValueError(
                f"Cross-entropy of logits {got} needs integer class targets of shape {wanted}, int64 or uint8 as for "
                f"torch in training, or probabilities of classes of the logits' shape; got {targets.dtype} "
                f"{tuple(targets.shape)}. {axes if last else ''}Convert integers with .long()."
            )
        labels = targets.long()
        labels = labels[labels != self.ignored]
        if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
            raise ValueError(
                f"Targets lie in [{int(labels.min())}, {int(labels.max())}] but the model has {classes} "
                "logits. Give the model one logit a class."
            )

    def _tokens(self, targets: Tensor) -> Tokens:
        further = targets.shape[2:] if targets.is_floating_point() else targets.shape[1:]
        return Tokens(after=math.prod(further))

    def _labelled(self, outputs: Tensor, targets: Tensor) -> tuple[Tokens, Tensor, Int[Tensor, "M"], Tensor]:
        """Tokens, logits, labels, and how much each token's loss counts beside its class weight."""
        tokens = self._tokens(targets)
        logits, flat = tokens.apart(outputs), targets.reshape(-1).long()
        counted = flat != self.ignored
        label, amount = torch.where(counted, flat, 0), counted.to(outputs)
        if self.mean and targets.ndim > 1:
            weights = amount if self.weight is None else amount * self._weights(self.weight, logits, targets)[label]
            total = weights.view(len(targets), -1).sum(1)
            amount = amount / torch.where(total > 0, total, 1.0).repeat_interleave(tokens.count)
        return tokens, logits, label, amount

    def mass(self, outputs: Tensor, targets: Tensor) -> Mass | MassOfOne:
        if targets.is_floating_point():
            tokens = self._tokens(targets)
            logits, given = tokens.apart(outputs), tokens.apart(targets.to(outputs).reshape(len(targets), -1))
            pivot, amount = given.argmax(1), outputs.new_ones(len(logits))
            amount = amount / tokens.count if self.mean else amount
            mass = (1 - self.smoothing) * given + self.smoothing / logits.shape[1]
        else:
            tokens, logits, pivot, amount = self._labelled(outputs, targets)
            if not self.smoothing:
                if self.weight is not None:
                    amount = amount * self._weights(self.weight, logits, targets)[pivot]
                return MassOfOne(tokens, logits, amount, pivot)
            mass = (1 - self.smoothing) * _one_hot(pivot, logits).to(outputs) + self.smoothing / logits.shape[1]
        mass = mass if self.weight is None else mass * self._weights(self.weight, logits, targets)
        return Mass(tokens, logits, amount[:, None] * mass, pivot)

    def _weights(self, weight: Float[Tensor, "C"], like: Tensor, targets: Tensor) -> Float[Tensor, "C"]:
        """The class weights, relative to their mean where torch's mean over a batch takes them so."""
        relative = self.mean and not targets.is_floating_point() and targets.ndim == 1
        return (weight / weight.mean() if relative else weight).to(like)


@dataclass(frozen=True)
class NegativeLogLikelihood(OfClasses):
    """ℓ = −w_y f_y for outputs f that are log-probabilities: the cross-entropy of f, since log_softmax(f) = f.

    In f itself the loss is linear, and its Gauss-Newton matrix would be zero; seen as the cross-entropy it has the
    curvature of the model that ends one layer earlier. Outputs that are not normalised are refused.
    """

    entropy: CrossEntropy

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.entropy.per_example(outputs, targets)

    def mass(self, outputs: Tensor, targets: Tensor) -> Mass | MassOfOne:
        return self.entropy.mass(outputs, targets)

    def draws(self, outputs: Tensor, targets: Tensor) -> int:
        return self.entropy.draws(outputs, targets)

    def counted(self, targets: Tensor) -> Bool[Tensor, "N ..."] | None:
        return self.entropy.counted(targets)

    def check_likelihood(self) -> None:
        self.entropy.check_likelihood()

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_tensor("NLLLoss", targets)
        if targets.is_floating_point():
            raise ValueError(f"NLLLoss needs integer class targets; got {targets.dtype}. Convert them with .long().")
        self.entropy.check(outputs, targets)
        if not is_normalised(outputs, 1):
            raise ValueError(
                "NLLLoss needs log-probabilities over the second axis, which these outputs are not. End the model with "
                "log_softmax(dim=1), or give its logits to nn.CrossEntropyLoss()."
            )


def is_normalised(outputs: Tensor, axis: int) -> bool:
    """Whether outputs are log-probabilities over this axis."""
    return bool((outputs.logsumexp(axis).abs() < NORMALISED).all())


@dataclass(frozen=True)
class Divergence(OfClasses):
    """ℓ = s Σ_c y_c (log y_c − f_c) for outputs f that are log-probabilities and probabilities y, or log y: the
    divergence KL(y ‖ softmax(f)), with the curvature of cross-entropy (see `NegativeLogLikelihood`).

    s is 1 for `reduction="batchmean"` and `"sum"`, and 1 over the number of outputs for `"mean"`. The axis of classes
    is that over which the model's outputs are normalised, the last of them where several are.
    """

    mean: bool = False
    log_target: bool = False
    axis: int = 1

    def per_example(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found = self.mass(outputs, targets)
        return found.values() + _sum(found.tokens, torch.xlogy(found.mass, self._given(outputs, targets)).sum(1))

    def check_likelihood(self) -> None:
        """Classes are drawn from the model."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        check_tensor("KLDivLoss", targets)
        if outputs.shape != targets.shape or not targets.is_floating_point() or outputs.ndim < 2:
            raise ValueError(
                f"KLDivLoss needs probabilities of the outputs' shape {tuple(outputs.shape)}; got {targets.dtype} "
                f"{tuple(targets.shape)}. Classes go with nn.CrossEntropyLoss()."
            )
        if not (self.log_target or (targets >= 0).all()):
            raise ValueError("KLDivLoss needs probabilities of at least 0; give log_target=True for their logarithms.")

    def fitted(self, few: Callable[[], tuple[Tensor, Tensor]]) -> ExampleLoss:
        outputs, _ = few()
        axes = [axis for axis in range(1, outputs.ndim) if is_normalised(outputs, axis)]
        if not axes:
            raise ValueError(
                "KLDivLoss needs log-probabilities, which these outputs are over no axis. End the model with "
                "log_softmax(dim=1)."
            )
        return replace(self, axis=axes[-1])

    def _tokens(self, targets: Tensor) -> Tokens:
        return Tokens(math.prod(targets.shape[1 : self.axis]), math.prod(targets.shape[self.axis + 1 :]))

    def _given(self, outputs: Tensor, targets: Tensor) -> Tensor:
        given = self._tokens(targets).apart(targets.to(outputs).reshape(len(targets), -1))
        return given.exp() if self.log_target else given

    def mass(self, outputs: Tensor, targets: Tensor) -> Mass:
        tokens, given = self._tokens(targets), self._given(outputs, targets)
        scale, logits = 1 / outputs.shape[1] if self.mean else 1.0, tokens.apart(outputs)
        return Mass(tokens, logits, scale * given, given.argmax(1))
