"""The per-example form of a criterion: in closed form for those of torch, by torch's derivatives for any other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from copy import deepcopy
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv.core.losses.base import ExampleLoss
from avalanche_curv.core.losses.binary import Bernoulli, BinaryCrossEntropy, SoftMargin
from avalanche_curv.core.losses.categorical import CrossEntropy, Divergence, NegativeLogLikelihood
from avalanche_curv.core.losses.elementwise import (
    AbsoluteError,
    HuberError,
    PoissonError,
    SquaredError,
)
from avalanche_curv.core.losses.function import REMEDY, LossFunction
from avalanche_curv.core.losses.gaussian import GaussianError
from avalanche_curv.core.losses.margins import MultiMargin, multi_label_margin

OF_FUNCTION: dict[Any, Callable[[], nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.gaussian_nll_loss: nn.GaussianNLLLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
}
"""The modules that are torch's functions with their defaults."""


@singledispatch
def example_loss(criterion: object) -> ExampleLoss:
    """The per-example form of a criterion, a module or a function; the mean or sum that it takes over a batch does not
    matter. `ExampleLoss` says what ℓ of an example is.

    In closed form: `CrossEntropyLoss`, `NLLLoss`, `KLDivLoss`, `BCELoss`, `BCEWithLogitsLoss`, `MSELoss`, `L1Loss`,
    `SmoothL1Loss`, `HuberLoss`, `PoissonNLLLoss`, `GaussianNLLLoss`, `SoftMarginLoss`, `MultiLabelSoftMarginLoss`, and
    their functions in `torch.nn.functional`, also with options, as `partial(F.cross_entropy, label_smoothing=0.1)`.
    `losses.gaussian` says where the variances of `GaussianNLLLoss` stand. Any other criterion(outputs, targets), of
    targets that may be a nesting of tensors, becomes a `LossFunction`; of a module a frozen copy in eval mode is taken.
    Add a closed form of your own with `@example_loss.register`.

    Raises TypeError for what cannot be called, and for classes.

    >>> example_loss(nn.MSELoss()).per_example(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([5.])
    """
    if isinstance(criterion, type):
        name = criterion.__name__
        raise TypeError(f"The criterion must be an object; got the class {name}. Did you mean nn.{name}()?")
    if not callable(criterion):
        meant = _meant(criterion) if isinstance(criterion, str) else ""
        got = repr(criterion) if isinstance(criterion, str) or criterion is None else type(criterion).__name__
        raise TypeError(
            f"The criterion must be a module or a function, such as nn.CrossEntropyLoss(); got {got}.{meant} {REMEDY}"
        )
    known = OF_FUNCTION.get(criterion) if isinstance(criterion, Hashable) else None
    return example_loss(known()) if known is not None else LossFunction(_frozen(criterion))


def _meant(name: str) -> str:
    """What is meant by the name of a module or of a function of torch."""
    module = OF_FUNCTION.get(getattr(F, name, None)) or getattr(nn, name, None)
    return f" Did you mean nn.{module.__name__}()?" if isinstance(module, type) else ""


def _frozen(criterion: Callable[..., Any]) -> Callable[..., Any]:
    """A function itself; of a module a copy in eval mode whose parameters stay as they are."""
    if not isinstance(criterion, nn.Module):
        return criterion
    return deepcopy(criterion).eval().requires_grad_(False)


Form = Callable[[Any], ExampleLoss]


def _of(known: type[nn.Module]) -> Callable[[Form], Form]:
    """Registers the form of a module of torch; a subclass with a forward of its own is a function like any other."""

    def registered(form: Form) -> Form:
        def chosen(criterion: nn.Module) -> ExampleLoss:
            own = type(criterion).forward is known.forward
            return form(criterion) if own else LossFunction(_frozen(criterion))

        example_loss.register(known, chosen)
        return form

    return registered


@example_loss.register
def _(criterion: ExampleLoss) -> ExampleLoss:
    return criterion


@example_loss.register(partial)
def _of_options(criterion: partial[Any]) -> ExampleLoss:
    """A function of torch with options of its module is that module; any other is a function."""
    known, options = OF_FUNCTION.get(criterion.func), criterion.keywords
    if known is None or criterion.args or not options.keys() <= inspect.signature(known).parameters.keys():
        return LossFunction(criterion)
    return example_loss(known(**options))


@_of(nn.CrossEntropyLoss)
def _cross_entropy(criterion: nn.CrossEntropyLoss) -> ExampleLoss:
    weight, mean = _copied(criterion.weight), criterion.reduction == "mean"
    return CrossEntropy(_class_weights(weight), criterion.label_smoothing, criterion.ignore_index, mean)


@_of(nn.NLLLoss)
def _nll(criterion: nn.NLLLoss) -> ExampleLoss:
    weight = _class_weights(_copied(criterion.weight))
    return NegativeLogLikelihood(CrossEntropy(weight, 0.0, criterion.ignore_index, criterion.reduction == "mean"))


@_of(nn.KLDivLoss)
def _kl(criterion: nn.KLDivLoss) -> ExampleLoss:
    return Divergence(criterion.reduction == "mean", criterion.log_target)


@_of(nn.MSELoss)
def _mse(criterion: nn.MSELoss) -> ExampleLoss:
    return SquaredError(criterion.reduction == "mean")


@_of(nn.L1Loss)
def _l1(criterion: nn.L1Loss) -> ExampleLoss:
    return AbsoluteError(criterion.reduction == "mean")


@_of(nn.SmoothL1Loss)
def _smooth_l1(criterion: nn.SmoothL1Loss) -> ExampleLoss:
    mean, beta = criterion.reduction == "mean", float(criterion.beta)
    return HuberError(beta, 1 / beta, mean) if beta else AbsoluteError(mean)


@_of(nn.HuberLoss)
def _huber(criterion: nn.HuberLoss) -> ExampleLoss:
    return HuberError(float(criterion.delta), 1.0, criterion.reduction == "mean")


@_of(nn.PoissonNLLLoss)
def _poisson(criterion: nn.PoissonNLLLoss) -> ExampleLoss:
    return PoissonError(criterion.log_input, criterion.full, criterion.eps, criterion.reduction == "mean")


@_of(nn.GaussianNLLLoss)
def _gaussian(criterion: nn.GaussianNLLLoss) -> ExampleLoss:
    return GaussianError(bool(criterion.full), criterion.eps, criterion.reduction == "mean")


@_of(nn.BCELoss)
def _bce(criterion: nn.BCELoss) -> ExampleLoss:
    return Bernoulli(criterion.reduction == "mean", _copied(criterion.weight))


@_of(nn.BCEWithLogitsLoss)
def _bce_with_logits(criterion: nn.BCEWithLogitsLoss) -> ExampleLoss:
    weights = _copied(criterion.pos_weight), _copied(criterion.weight)
    return BinaryCrossEntropy(criterion.reduction == "mean", *weights)


@_of(nn.SoftMarginLoss)
def _soft_margin(criterion: nn.SoftMarginLoss) -> ExampleLoss:
    return SoftMargin(criterion.reduction == "mean")


@_of(nn.MultiLabelSoftMarginLoss)
def _multi_label_soft_margin(criterion: nn.MultiLabelSoftMarginLoss) -> ExampleLoss:
    if criterion.reduction == "mean":
        return BinaryCrossEntropy(True, None, _copied(criterion.weight), "MultiLabelSoftMarginLoss")
    return LossFunction(_frozen(criterion))  # which divides by classes, and by no further axes


@_of(nn.MultiMarginLoss)
def _multi_margin(criterion: nn.MultiMarginLoss) -> ExampleLoss:
    return LossFunction(MultiMargin(criterion.p, criterion.margin, _copied(criterion.weight)))


@_of(nn.MultiLabelMarginLoss)
def _multi_label_margin(criterion: nn.MultiLabelMarginLoss) -> ExampleLoss:
    return LossFunction(multi_label_margin)


def _class_weights(weight: Tensor | None) -> Tensor | None:
    if weight is not None and not ((weight >= 0).all() and 0 < weight.mean() < torch.inf):
        raise ValueError(f"Class weights must be finite, at least 0 and not all 0; got {weight.tolist()}. Scale them.")
    return weight


def _copied(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().clone()
