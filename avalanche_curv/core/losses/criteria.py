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


Form = Callable[[Any, bool], ExampleLoss]
"""A module of torch, and whether it takes means ↦ its form."""

FORMS: dict[type[nn.Module], Form] = {
    nn.CrossEntropyLoss: lambda c, mean: CrossEntropy(_class_weights(c), c.label_smoothing, c.ignore_index, mean),
    nn.NLLLoss: lambda c, mean: NegativeLogLikelihood(CrossEntropy(_class_weights(c), 0.0, c.ignore_index, mean)),
    nn.KLDivLoss: lambda c, mean: Divergence(mean, c.log_target),
    nn.MSELoss: lambda c, mean: SquaredError(mean),
    nn.L1Loss: lambda c, mean: AbsoluteError(mean),
    nn.SmoothL1Loss: lambda c, mean: HuberError(float(c.beta), 1 / c.beta, mean) if c.beta else AbsoluteError(mean),
    nn.HuberLoss: lambda c, mean: HuberError(float(c.delta), 1.0, mean),
    nn.PoissonNLLLoss: lambda c, mean: PoissonError(c.log_input, c.full, c.eps, mean),
    nn.GaussianNLLLoss: lambda c, mean: GaussianError(bool(c.full), c.eps, mean),
    nn.BCELoss: lambda c, mean: Bernoulli(mean, _copied(c.weight)),
    nn.BCEWithLogitsLoss: lambda c, mean: BinaryCrossEntropy(mean, _copied(c.pos_weight), _copied(c.weight)),
    nn.SoftMarginLoss: lambda c, mean: SoftMargin(mean),
    nn.MultiLabelSoftMarginLoss: lambda c, mean: (
        BinaryCrossEntropy(True, None, _copied(c.weight), "MultiLabelSoftMarginLoss") if mean
        else LossFunction(_frozen(c))  # which divides by classes, and by no further axes
    ),
    nn.MultiMarginLoss: lambda c, _: LossFunction(MultiMargin(c.p, c.margin, _copied(c.weight))),
    nn.MultiLabelMarginLoss: lambda *_: LossFunction(multi_label_margin),
}  # fmt: skip


def _form(known: type[nn.Module], criterion: nn.Module) -> ExampleLoss:
    """The form of a module of torch; a subclass with a forward of its own is a function like any other."""
    own = type(criterion).forward is known.forward
    return FORMS[known](criterion, criterion.reduction == "mean") if own else LossFunction(_frozen(criterion))


for _known in FORMS:
    example_loss.register(_known, partial(_form, _known))


def _class_weights(criterion: Any) -> Tensor | None:
    weight = _copied(criterion.weight)
    if weight is not None and not ((weight >= 0).all() and 0 < weight.mean() < torch.inf):
        raise ValueError(f"Class weights must be finite, at least 0 and not all 0; got {weight.tolist()}. Scale them.")
    return weight


def _copied(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().clone()
