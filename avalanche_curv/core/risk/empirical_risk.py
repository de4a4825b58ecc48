"""The empirical risk of past examples at frozen parameters: the one place that normalises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.batches import Batches, Rebatched, like, random_part, without_drawing
from avalanche_curv.core.risk.frozen import check_function, check_precision, frozen_copy
from avalanche_curv.core.risk.losses import ExampleLoss, example_loss
from avalanche_curv.core.risk.parameters import ParameterSpace


@dataclass(frozen=True)
class EmpiricalRisk:
    """L(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i) around a frozen copy of the model, in eval mode.

    The mean is over examples: batch sizes, a ragged last batch and the criterion's `reduction` do not matter.
    Build one with `EmpiricalRisk.snapshot`; the user's model, its gradients, flags and buffers stay as they are.
    Half-precision models are copied in float32.

    >>> risk = EmpiricalRisk.snapshot(nn.Linear(1, 1), nn.MSELoss(), [(torch.zeros(3, 1), torch.ones(3, 1))])
    >>> risk.examples, risk.space.size
    (3, 2)
    """

    base: nn.Module
    loss: ExampleLoss
    batches: Batches
    adapter: Callable[[nn.Module], nn.Module] | None = None

    @classmethod
    @in_own_precision
    def snapshot(
        cls,
        model: nn.Module,
        criterion: object,
        batches: Batches,
        *,
        adapter: Callable[[nn.Module], nn.Module] | None = None,
    ) -> EmpiricalRisk:
        """Freeze `model` and look at `batches` of (inputs, targets), which may be any iterable.

        `adapter` wraps the frozen copy where the model is not called as `model(inputs)`; the wrapper keeps the copy
        under the attribute `module`. Raises TypeError for a criterion without a per-example form, ValueError for a
        model without trainable parameters, for empty data and for data that the loss does not cover.
        """
        loss = example_loss(criterion)
        kept = tuple(batches) if iter(batches) is batches else batches
        risk = cls(frozen_copy(model), loss, kept, adapter)
        risk._check()
        return risk

    @cached_property
    def model(self) -> nn.Module:
        """The frozen module that maps inputs to outputs."""
        return self.base if self.adapter is None else self.adapter(self.base)

    @cached_property
    def space(self) -> ParameterSpace:
        """The trainable parameters of the frozen model."""
        return ParameterSpace.of(self.base)

    @cached_property
    @in_own_precision
    def anchor(self) -> Float[Tensor, "P"]:
        """The frozen parameters as one vector."""
        return self.space.vector(self.base)

    @cached_property
    def examples(self) -> int:
        """N, the number of examples: the attribute `examples` of the batches, or counted in one pass."""
        known = getattr(self.batches, "examples", None)
        return sum(len(targets) for _, targets in self.batches) if known is None else known

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The frozen parameters, in the order of `space`."""
        return [p for p in self.base.parameters() if p.requires_grad]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, on the model's device and in its floating point type."""
        for inputs, targets in without_drawing(self.batches):
            x, y = like(inputs, self.anchor), like(targets, self.anchor)
            self.loss.check(self.one_output.expand(len(y), *self.one_output.shape[1:]), y)
            yield x, y

    @cached_property
    @in_own_precision
    def one_output(self) -> Float[Tensor, "1 *C"]:
        """The outputs of one example, for their shape."""
        inputs, _ = next(without_drawing(self.batches))
        with torch.no_grad():
            outputs = self.model(like(inputs[:1], self.anchor))
        return outputs if outputs.ndim > 1 else outputs[:, None]

    @in_own_precision
    def outputs(self, inputs: Tensor) -> Float[Tensor, "N C"]:
        """f(inputs) of the frozen model, as a matrix."""
        return as_matrix(self.model(inputs))

    @in_own_precision
    def outputs_at(self, parameters: Sequence[Tensor], inputs: Tensor) -> Float[Tensor, "N C"]:
        """f(inputs) of the frozen past function at other parameters, given in the order of `space`."""
        values = {place: parameters[index] for place, index in self._places.items()}
        return as_matrix(functional_call(self.model, values, (inputs,), tie_weights=False))

    @cached_property
    def _places(self) -> dict[str, int]:
        """Every place that holds a trainable parameter, each module once: `functional_call` would tie the weights of a
        module registered under two names to themselves, and not give them back."""
        index = {id(p): i for i, p in enumerate(self.parameters)}
        return {
            f"{prefix}.{name}" if prefix else name: index[id(p)]
            for prefix, module in self.model.named_modules()
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in index
        }

    def copied_model(self) -> tuple[nn.Module, list[nn.Parameter]]:
        """A copy of `model`, and its trainable parameters in the order of `space`."""
        base = copy.deepcopy(self.base)
        return replace(self, base=base).model, [p for p in base.parameters() if p.requires_grad]

    @in_own_precision
    def value(self) -> float:
        """L at the frozen parameters, summed in float64."""
        with torch.no_grad():
            return sum(self.loss.per_example(self.outputs(x), y).double().sum().item() for x, y in self) / self.examples

    @in_own_precision
    def value_at(self, parameters: Float[Tensor, "P"]) -> float:
        """L of the frozen past function at other parameters."""
        tensors = self.space.split(parameters)
        with torch.no_grad():
            losses = (self.loss.per_example(self.outputs_at(tensors, x), y).double().sum().item() for x, y in self)
            return sum(losses) / self.examples

    @in_own_precision
    def gradient(self) -> Float[Tensor, "P"]:
        """∇L at the frozen parameters."""
        total = torch.zeros_like(self.anchor)
        for x, y in self:
            total += self.summed_gradient(x, y)
        return total / self.examples

    @in_own_precision
    @torch.enable_grad()
    def summed_gradient(self, inputs: Tensor, targets: Tensor) -> Float[Tensor, "P"]:
        """Σ_i ∇ℓ_i over one batch."""
        loss = self.loss.per_example(self.outputs(inputs), targets).sum()
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return self.space.flatten(list(parts))

    def subset(self, fraction: float, seed: int) -> EmpiricalRisk:
        """The risk of a random `fraction` of the examples, at least one, drawn without replacement by `seed`."""
        return self.select(random_part(self.examples, fraction, seed))

    @in_own_precision
    def select(self, indices: Tensor) -> EmpiricalRisk:
        """The risk of the examples at sorted `indices`, held in memory as one batch."""
        chosen, start = [], 0
        for inputs, targets in self.batches:
            here = indices[(indices >= start) & (indices < start + len(targets))] - start
            start += len(targets)
            if len(here):
                chosen.append((inputs[here.to(inputs.device)], targets[here.to(targets.device)]))
        inputs, targets = (torch.cat(parts) for parts in zip(*chosen))
        return replace(self, batches=((inputs, targets),))

    def rebatched(self, size: int) -> EmpiricalRisk:
        """The same examples in the same order, in batches of `size`."""
        return replace(self, batches=Rebatched(self.batches, size))

    def at(self, other: EmpiricalRisk) -> EmpiricalRisk:
        """The same examples, loss and adapter at the parameters where `other` is frozen."""
        return replace(self, base=other.base)

    def frozen_at(self, model: nn.Module) -> EmpiricalRisk:
        """The same examples, loss and adapter with a new frozen copy of `model` as the past function."""
        return replace(self, base=frozen_copy(model))

    def _check(self) -> None:
        _ = self.space
        first: Any = next(without_drawing(self.batches), None)
        if first is not None and (len(first) != 2 or not all(isinstance(part, Tensor) for part in first)):
            raise ValueError(
                f"Each batch must be a pair of tensors (inputs, targets); got {[type(p).__name__ for p in first]}."
            )
        if first is None or not len(first[1]):
            raise ValueError("The risk of no examples is not defined: got no batch, or an empty one. Give one or more.")
        few = like(first[0][:2], self.anchor).clone()
        check_precision(self.model, few)
        check_function(self.model, few)
        whole = isinstance(self.batches, (tuple, list))  # what has to be loaded is checked as it comes
        for _ in self if whole else islice(self, 1):
            pass


def joined_risk(risks: list[EmpiricalRisk]) -> EmpiricalRisk:
    """The risk of the examples of all `risks`, in order, which must share the frozen model of the first; one batch
    where the inputs have one shape."""
    if len(risks) == 1:
        return risks[0]
    inputs, targets = zip(*(batch for risk in risks for batch in risk.batches))
    same = len({x.shape[1:] for x in inputs}) == 1
    batches = ((torch.cat(inputs), torch.cat(targets)),) if same else tuple(zip(inputs, targets))
    return replace(risks[0], batches=batches)


def frozen_together(risks: Sequence[EmpiricalRisk], model: nn.Module) -> tuple[EmpiricalRisk, ...]:
    """The given risks, each with its own examples, at one common frozen copy of `model` as it is now."""
    if not risks:
        return ()
    first = risks[0].frozen_at(model)
    return (first, *(risk.at(first) for risk in risks[1:]))


def as_matrix(outputs: Tensor) -> Float[Tensor, "N C"]:
    """Outputs as [N, C]: one number an example becomes one column, further axes are flattened."""
    return outputs.reshape(outputs.shape[0], -1)
