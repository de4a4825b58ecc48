"""Any other criterion(outputs, targets): its derivatives in the outputs by torch, checked on a few examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jacrev, vmap

from avalanche_curv.core.losses.base import ExampleLoss
from avalanche_curv.core.losses.factor import Columns, Factor
from avalanche_curv.core.nested import Nested, cat, described, index, leaves, mapped, rebuilt, split
from avalanche_curv.core.options import check_flag, optional, settle

WIDEST = 4096  # outputs of an example of whose second derivatives a matrix is made
AGREE = 3e-3  # relative: more than rounding in single precision


@dataclass(frozen=True)
class LossFunction(ExampleLoss):
    """ℓ(f, y) = function(f[None], y[None]): what a function or module returns for a batch of one example, summed where
    that is not one number. Outputs have the model's own shape; targets are a tensor or a nesting of tensors (tuple,
    list, mapping), each with the example as first axis. Outputs of several heads go in one tensor, joined by `forward`
    and taken apart by the function.

    Derivatives in the outputs are torch's: those of all examples at once, by `torch.func`, where these are right on a
    few examples, and else of one example after the other. Of K outputs the second derivatives are a [K, K] matrix for
    each example, factored by its eigenvectors: K² numbers an example, for up to 4,096 outputs. A negative eigenvalue is
    refused (ValueError), since no GGN is made of a loss that is not convex in the outputs: `EmpiricalFisher()` and
    `Hessian(psd=Clip())` are. `sample(outputs, uniform)` draws targets [N, ...] of the likelihood exp(−ℓ) from uniform
    numbers of the outputs' shape; with it there is a `Fisher(samples=m)`, without it none.

    On a few examples and on a first batch it is checked that the loss of a batch is the mean or the sum of the losses
    of its examples. `criterion(outputs, targets)` is the function, for training.

    Example: `LossFunction(lambda f, y: (f - y).pow(4).mean())`.
    """

    function: Callable[[Tensor, Nested], Tensor]
    sample: Callable[[Tensor, Tensor], Nested] | None = None
    _shape: tuple[int, ...] | None = field(default=None, repr=False)
    _at_once: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        settle(self, function=_check_function, sample=optional(_check_function), _at_once=check_flag)
        if not (self._shape is None or isinstance(self._shape, tuple)):
            raise TypeError(f"LossFunction(_shape=...) is found on some outputs; got {self._shape!r}.")

    def __call__(self, outputs: Tensor, targets: Nested) -> Tensor:
        """What the function gives for a batch."""
        return self.function(outputs, targets)

    def per_example(self, outputs: Tensor, targets: Nested) -> Tensor:
        shaped = self._shaped(outputs, targets)
        if self._at_once:
            return self._over_examples(self._one, shaped, targets)
        return torch.stack([self._one(f, y) for f, y in _pairs(shaped, targets)])

    def gradient(self, outputs: Tensor, targets: Nested) -> Tensor:
        shaped = self._shaped(outputs, targets).detach()
        if self._at_once:
            return self._over_examples(grad(self._one), shaped, targets).reshape(outputs.shape).detach()
        return torch.stack([self._slope(f, y) for f, y in _pairs(shaped, targets)]).reshape(outputs.shape)

    def hessian_factor(self, outputs: Tensor, targets: Nested) -> Factor:
        width = outputs.shape[1]
        if width > WIDEST:
            raise ValueError(
                f"The second derivatives of {self.name} in {width} outputs are a matrix of {width**2} numbers for each "
                f"example, more than {WIDEST**2}. Use EmpiricalFisher(), or write the criterion as an ExampleLoss."
            )
        second = self._second(self._shaped(outputs, targets).detach(), targets).reshape(-1, width, width).detach()
        if not second.isfinite().all():
            return Columns(second)  # refused where it is seen that the curvature is not finite
        values, vectors = torch.linalg.eigh((second + second.mT) / 2)
        if values.min() < -(torch.finfo(values.dtype).eps ** 0.5) * values.abs().max():
            raise ValueError(
                f"{self.name} is not convex in the outputs: its second derivatives have the eigenvalue "
                f"{values.min().item():.3g}, and no Gauss-Newton matrix is made of them. Use EmpiricalFisher(), "
                "Hessian(psd=Clip()), or a criterion that is convex in the outputs."
            )
        return Columns(vectors * values.clamp_min(0).sqrt()[:, None])

    def fisher_factor(self, outputs: Tensor, targets: Nested) -> Factor:
        raise self._without_expectation()

    def sample_gradients(self, outputs: Tensor, targets: Nested, uniform: Tensor) -> Tensor:
        if self.sample is None:
            raise self._without_likelihood()
        shaped = self._shaped(outputs, targets)
        drawn = [self.sample(shaped, some.reshape(shaped.shape)) for some in uniform.unbind(1)]
        return torch.stack([self.gradient(outputs, y) for y in drawn], dim=2)

    def check_likelihood(self) -> None:
        if self.sample is None:
            raise self._without_likelihood()

    def check_expectation(self) -> None:
        self.check_likelihood()
        raise self._without_expectation()

    def _without_likelihood(self) -> ValueError:
        return ValueError(
            f"The Fisher information is not defined for {self.name}, of which no likelihood is known. Use GGN() or "
            "EmpiricalFisher(), or say how its targets are drawn from uniform numbers, in two lines:\n"
            "    criterion = LossFunction(f, sample=lambda outputs, uniform: outputs + torch.special.ndtri(uniform))\n"
            "    regularizer = CurvatureRegularizer(1.0, curvature=Fisher(samples=1))"
        )

    def _without_expectation(self) -> ValueError:
        return ValueError(
            f"The exact Fisher information of {self.name} is not known: its targets are drawn by a function. Use "
            "Fisher(samples=1), GGN() or EmpiricalFisher()."
        )

    def check(self, outputs: Tensor, targets: Nested) -> None:
        """Every output and target that the criterion takes is covered."""

    @property
    def name(self) -> str:
        """The criterion, in messages."""
        function = self.function.func if isinstance(self.function, partial) else self.function
        return getattr(function, "__name__", type(function).__name__)

    def fitted(self, few: Callable[[], tuple[Tensor, Tensor]]) -> LossFunction:
        outputs, targets = few()
        outputs = outputs.detach()
        if len(outputs) == 1:  # and another one, to be looked at beside it
            outputs, targets = torch.cat([outputs, 0.9 * outputs + 0.05]), cat([targets, targets])
        alone = torch.stack([self._tried(*one) for one in split((outputs, targets), 1)])
        for count in (len(outputs), len(outputs) - 1 or 1):
            some, of_some = index((outputs, targets), slice(-count, None))
            self._check_separable(some, of_some, alone[-count:])
        found = replace(self, _shape=tuple(outputs.shape[1:]))
        return replace(found, _at_once=found._is_right_at_once(outputs, targets))

    def check_batch(self, batch: Callable[[], tuple[Tensor, Nested]]) -> None:
        outputs, targets = batch()
        twos = torch.arange(len(outputs)) // 2 * 2
        shared = ", two by two with one target,"  # so that there are positive pairs for a criterion that looks for some
        for given, of_which in ((targets, ""), (index(targets, twos), shared)):
            with torch.no_grad():
                alone = self.per_example(outputs.reshape(len(outputs), -1), given)
            self._check_separable(outputs, given, alone, of_which)

    def _tried(self, outputs: Tensor, targets: Nested) -> Tensor:
        try:
            with torch.no_grad():
                loss = self.function(outputs, targets)
        except Exception as error:
            raise ValueError(
                f"The criterion {self.name} cannot be called with outputs {described(outputs)} and targets "
                f"{described(targets)}: {type(error).__name__}: {error}. {REMEDY}"
            ) from error
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise TypeError(f"The criterion {self.name} gives {type(loss).__name__}; expected a loss. {REMEDY}")
        return loss.sum()

    def _check_separable(
        self, outputs: Tensor, targets: Nested, alone: Float[Tensor, "n"], of_which: str = ""
    ) -> None:
        together, count = self._tried(outputs, targets), len(alone)
        floor = AGREE * float(alone.abs().mean()) + 1e-6
        ways = ((alone.mean(), floor), (alone.sum(), floor * max(1.0, count / 4)))
        is_one = alone.isfinite().all() and any(float((together - way).abs()) <= within for way, within in ways)
        if is_one or not together.isfinite():
            return
        raise ValueError(
            f"{self.name} mixes the examples of a batch: for {count} of them{of_which} it gives {float(together):.6g}, "
            f"which is neither the mean ({float(alone.mean()):.6g}) nor the sum of its values for each of them alone. "
            f"Past loss is a mean over examples: {_of_single_examples(outputs, targets)}"
        )

    def _is_right_at_once(self, outputs: Tensor, targets: Nested) -> bool:
        """Whether values and slopes of all examples at once are those of one after the other."""
        flat = outputs.reshape(len(outputs), -1)
        slow = replace(self, _at_once=False)
        wanted = slow.per_example(flat, targets), slow.gradient(flat, targets)
        try:
            found = self.per_example(flat, targets), self.gradient(flat, targets)
        except Exception:  # of any kind: torch has many for an operation without this derivative
            return False
        return all(torch.allclose(*pair, AGREE, 1e-6, equal_nan=True) for pair in zip(found, wanted))

    def _one(self, outputs: Tensor, target: Nested) -> Tensor:
        return self.function(outputs[None], index(target, None)).sum()

    def _over_examples(self, function: Callable[[Tensor, Nested], Tensor], shaped: Tensor, targets: Nested) -> Tensor:
        """`vmap` of a function of the outputs and the target of one example."""
        return vmap(lambda f, tensors: function(f, rebuilt(targets, tensors)))(shaped, leaves(targets))

    @torch.enable_grad()
    def _slope(self, outputs: Tensor, target: Nested) -> Tensor:
        free = outputs.detach().clone().requires_grad_()
        loss = self._one(free, target)
        if not loss.requires_grad:
            return torch.zeros_like(free)
        (slope,) = torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True)
        return slope

    def _second(self, shaped: Tensor, targets: Nested) -> Tensor:
        if self._at_once:
            try:
                return self._over_examples(jacrev(grad(self._one)), shaped, targets)
            except (RuntimeError, NotImplementedError):
                pass  # a derivative of which vmap has no rule
        with torch.enable_grad():
            return torch.stack([
                torch.autograd.functional.hessian(lambda v, y=y: self._one(v, y), f)
                for f, y in _pairs(shaped, targets)
            ])

    def _shaped(self, outputs: Float[Tensor, "N K"], targets: Nested) -> Tensor:
        """Outputs in the model's own shape; where sequences of another length come, one axis has another size."""
        shape = self._shape
        if shape is None or len(shape) == 1 or outputs.shape[1] == math.prod(shape):
            return outputs if shape is None or len(shape) == 1 else outputs.reshape(len(outputs), *shape)
        places = [axis for axis, size in enumerate(shape) if outputs.shape[1] % (math.prod(shape) // size) == 0]
        sizes = {axis: outputs.shape[1] // (math.prod(shape) // shape[axis]) for axis in places}
        of_targets = {size for target in leaves(targets) for size in target.shape[1:]}
        fitting = [axis for axis in places if sizes[axis] in of_targets]
        if len(fitting) != 1:
            raise ValueError(
                f"{outputs.shape[1]} outputs of an example have no shape like {shape} that is known to be theirs. Give "
                "batches whose outputs have one shape, as by padding."
            )
        own = list(shape)
        own[fitting[0]] = sizes[fitting[0]]
        return outputs.reshape(len(outputs), *own)


def _of_single_examples(outputs: Tensor, targets: Nested) -> str:
    """The remedy for a criterion that mixes examples."""
    if outputs.ndim > 2 and isinstance(targets, Tensor) and not targets.is_floating_point():
        last = targets.shape == outputs.shape[:-1]
        forward = ", forward=lambda model, inputs: model(inputs).movedim(-1, 1)" if last else ""
        return (
            "nn.CrossEntropyLoss() takes it over the tokens that count of each, of outputs [N, C, T], targets [N, T] "
            f"with -100 at padding, as EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches{forward})."
        )
    return (
        "give a criterion of single examples for the past, as EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), "
        "batches). Class weights and ignore_index belong into torch's module, as nn.CrossEntropyLoss(weight=...)."
    )


def _pairs(shaped: Tensor, targets: Nested) -> Iterator[tuple[Tensor, Nested]]:
    """The outputs and the target of one example after the other."""
    return zip(shaped, (mapped(lambda tensor: tensor[0], one) for one in split(targets, 1)))


def _check_function(name: str, value: Any) -> Any:
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name} takes a function of outputs and targets; got {value!r}. {REMEDY}")
    return value


REMEDY = (
    "Give what is called as criterion(outputs, targets), in two lines:\n"
    "    criterion = LossFunction(lambda outputs, targets: (outputs - targets).square().mean())\n"
    "    risk = EmpiricalRisk.snapshot(model, criterion, batches)"
)
