"""The empirical risk of past examples at frozen parameters: the one place that normalises."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.losses import ExampleLoss, example_loss
from avalanche_curv.core.nested import Nested, index, repeated, shapes
from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.options import OneLine, check_fraction
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.batches import Batches, CountedBatches, Rebatched, count, kept, like, merged, random_part
from avalanche_curv.core.risk.few import FEW, few_of
from avalanche_curv.core.risk.forward import (
    Called,
    Forward,
    as_matrix,
    convention_of,
    is_plainly_called,
    storable_forward,
)
from avalanche_curv.core.risk.frozen import check_unchanged, copied_base, copied_without_graphs, frozen_copy, unwrapped
from avalanche_curv.core.risk.known import is_plain
from avalanche_curv.core.risk.labelled import Labelled, is_labelled, settled
from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_name
from avalanche_curv.core.risk.preflight import check_given, check_risk, drop_hooks
from avalanche_curv.core.risk.selection import ParameterSelector, Selection, selection_of
from avalanche_curv.core.state import Storable


@dataclass(frozen=True)
class EmpiricalRisk(OneLine, Storable):
    """L(θ) = (1/N) Σ_i ℓ(f_θ(x_i), y_i) around a frozen copy of the model, in eval mode.

    The mean is over examples: batch sizes, a ragged last batch and the criterion's `reduction` do not matter.
    Build one with `EmpiricalRisk.snapshot`; the user's model, its gradients, flags and buffers stay as they are.
    Frozen parameters (`requires_grad=False`) outside of the space are not copied: they must keep their values for as
    long as the risk is used (ValueError), which one pass over their memory sees at each use. A model with half
    precision computes in float32: of frozen parameters one layer at a time is widened, all others are copied so.

    >>> risk = EmpiricalRisk.snapshot(nn.Linear(1, 1), nn.MSELoss(), [(torch.zeros(3, 1), torch.ones(3, 1))])
    >>> risk.examples, risk.space.size
    (3, 2)
    """

    base: nn.Module
    form: ExampleLoss
    batches: Batches
    forward: Forward | None = None
    """(base, inputs) ↦ outputs; None where it is base(inputs)."""
    selection: Selection = Selection()  # noqa: RUF009  a frozen value
    verdicts: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was found out of the frozen model by trying: which of several ways to a derivative is right, for instance.
    Risks of one frozen model share it."""

    @classmethod
    @known_arguments
    @in_own_precision
    def snapshot(
        cls,
        model: nn.Module,
        criterion: object,
        batches: Batches,
        *,
        forward: Forward | None = None,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> EmpiricalRisk:
        """Freeze `model` and look at `batches` of (inputs, targets), which may be any iterable.

        Inputs, and targets of a criterion of your own, are a tensor or any nesting of tensors (tuple, list, mapping,
        None), each with the example as first axis; they follow the model's device. A list of batches is kept as it is
        now. A loader is passed over several times, each time from the same random states, so that it may shuffle; one
        that shuffles by the number of passes, as that of Hugging Face's `Trainer`, is held in memory.

        A tensor goes in as `model(x)`, a tuple as `model(*x)`, a mapping as `model(**x)`, and outputs with `logits`
        give these; `forward` says another way, which gives a tensor: `lambda model, inputs: model(**inputs)[0]`. A
        batch that is a mapping with `labels` is one of Hugging Face's: they are the targets, of causal language models
        as next tokens, and decoder inputs are made of them as in training. What is so made is compared with the loss
        that the model itself returns: see `core.risk.labelled`.

        The parameter space is that of the trainable parameters, or with `include` of those that it selects by name
        ("head", "*.bias") or by type of module, also where they are frozen (`requires_grad=False`) and train only
        later; without those that `exclude` selects.

        Raises TypeError for arguments in another order and for data that are no batches, for what is no criterion, for
        a model that cannot be copied or gives no tensor, and for selectors of another type; ValueError for a criterion
        that mixes examples, for a model without trainable parameters, or of which some have no values yet, or that is
        no function of single examples, for a selector that fits none, for empty data and for data that the loss does
        not cover; for labels whose cross-entropy is not the loss that the model itself returns.
        """
        check_given(model, criterion, batches)
        selection = selection_of(include, exclude)
        selection.check(unwrapped(model))
        loss = example_loss(criterion)
        base, held = frozen_copy(model, selection), kept(batches)
        first: Any = next(iter(held), None)
        convention = convention_of(base, labelled=is_labelled(first))
        if is_labelled(first):
            few = like(index(first, slice(FEW)), next(base.parameters(), torch.zeros(())))
            convention = settled(convention, base, few, forward, loss)
            pairs = Labelled(held, convention, base)
            held = tuple(pairs) if isinstance(held, tuple) else pairs
        risk = cls(base, loss, held, forward, selection)
        if forward is None and not is_plainly_called(base, index(risk.few[0], slice(1))):
            risk = replace(risk, forward=convention)
        check_risk(risk)
        return risk

    def described(self) -> tuple[str, ...]:
        known = "examples" in vars(self) or isinstance(self.batches, (tuple, CountedBatches))
        count = f"{self.examples} examples" if known else "examples to be loaded"
        return count, f"{type(self.form).__name__} of {type(self.base).__name__}", f"{self.space.size} parameters"

    def stored_fields(self) -> dict[str, Any]:
        batches = tuple((inputs, targets) for inputs, targets in self.batches)
        return {"batches": batches, "forward": storable_forward(self.forward), "selection": self.selection}

    @cached_property
    def model(self) -> nn.Module:
        """The frozen module that maps inputs to outputs."""
        return self.base if self.forward is None else Called(self.base, self.forward)

    @cached_property
    def space(self) -> ParameterSpace:
        """The selected parameters of the frozen model: those of its that require a gradient."""
        return ParameterSpace.of(self.base)

    @cached_property
    @in_own_precision
    def anchor(self) -> Float[Tensor, "P"]:
        """The frozen parameters as one vector."""
        return self.space.vector(self.base)

    @cached_property
    def examples(self) -> int:
        """N, the number of examples: as `CountedBatches` say, or counted in one pass."""
        return count(self.batches)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The frozen parameters, in the order of `space`."""
        return [p for p in self.base.parameters() if p.requires_grad]

    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        """The batches, on the model's device and in its floating point type, without empty ones. Raises ValueError
        where frozen parameters that are not copied were changed since."""
        check_unchanged(self.base)
        for inputs, targets in self.batches:
            if not number_of(targets):
                continue
            x, y = like(inputs, self.anchor), like(targets, self.anchor)
            one = self.output_like(x)
            self.loss.check(repeated(one, number_of(y)), y)
            yield x, y

    @cached_property
    def few(self) -> tuple[Nested, Nested]:
        """Some examples of one shape, up to four. Raises ValueError where there is none, and for batches that are no
        pairs of tensors or nestings of these."""
        return like(few_of(self.batches), self.anchor)

    def trial(self, count: int = FEW) -> EmpiricalRisk:
        """The risk of those few examples, or of so many of them."""
        return replace(self, batches=(index(self.few, slice(count)),))

    @cached_property
    def one_output(self) -> Float[Tensor, "1 *C"]:
        """The outputs of one example, for their shape."""
        return self._whole(index(self.few[0], slice(1)))

    def output_like(self, inputs: Nested) -> Float[Tensor, "1 *C"]:
        """The outputs of one example, for their shape: the first of these inputs, where it is not known."""
        if shapes(inputs) == shapes(self.few[0]):
            return self.one_output
        return self._whole(index(inputs, slice(1)))

    @in_own_precision
    def _whole(self, inputs: Nested) -> Float[Tensor, "N *C"]:
        """Outputs in their own shape, without a graph."""
        with torch.no_grad():
            return self.model(inputs)

    @cached_property
    def loss(self) -> ExampleLoss:
        """ℓ, for the outputs that this model has."""
        return self.form.fitted(lambda: (self._whole(self.few[0]), self.few[1]))

    @cached_property
    def one_loss(self) -> Float[Tensor, "1"]:
        """The loss of one example, which is finite where logits masked with −inf are not."""
        inputs, targets = index(self.few, slice(1))
        with torch.no_grad():
            return self.loss.per_example(self.outputs(inputs), targets)

    @in_own_precision
    def outputs(self, inputs: Nested) -> Float[Tensor, "N C"]:
        """f(inputs) of the frozen model, as a matrix."""
        return as_matrix(self.model(inputs))

    @contextmanager
    def holding(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Gives the frozen model other values, in the order of `space`, for as long as the context is open. `outputs`
        and derivatives in `parameters` are then those at these values, by plain reverse mode."""
        own, _ = self.parameters, self.anchor
        before = [parameter.data for parameter in own]
        try:
            for parameter, value in zip(own, parameters):
                parameter.data = value.detach().to(parameter)
            yield
        finally:
            for parameter, value in zip(own, before):
                parameter.data = value

    @in_own_precision
    def outputs_at(self, parameters: Sequence[Tensor], inputs: Nested) -> Float[Tensor, "N C"]:
        """f(inputs) of the frozen past function as a function of its parameters, given in the order of `space`, for
        the transforms of torch.func."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> EmpiricalRisk:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copied_without_graphs(self.__dict__, memo))
        return copied

    def with_base(self, base: nn.Module) -> EmpiricalRisk:
        """The same examples, loss and forward with another frozen model."""
        return replace(self, base=base, verdicts={})

    @in_own_precision
    def losses(self) -> Float[Tensor, "N"]:
        """ℓ of each example at the frozen parameters."""
        with torch.no_grad():
            return torch.cat([self.loss.per_example(self.outputs(x), y) for x, y in self])

    @in_own_precision
    def value(self) -> float:
        """L at the frozen parameters, summed in float64."""
        with torch.no_grad():
            return sum(self.loss.per_example(self.outputs(x), y).double().sum().item() for x, y in self) / self.examples

    @takes(parameters=(Tensor, "risk.space.vector(model)"))
    @in_own_precision
    def value_at(self, parameters: Float[Tensor, "P"]) -> float:
        """L of the frozen past function at other parameters."""
        with self.holding(self.space.split(parameters)):
            return self.value()

    def gradient(self) -> Float[Tensor, "P"]:
        """∇L at the frozen parameters."""
        return self.losses_and_gradient()[1]

    @in_own_precision
    @torch.enable_grad()
    def losses_and_gradient(self) -> tuple[Float[Tensor, "N"], Float[Tensor, "P"]]:
        """ℓ of each example and ∇L at the frozen parameters, from one pass."""
        losses, total = [], torch.zeros_like(self.anchor)
        for x, y in self:
            found = self.loss.per_example(self.outputs(x), y)
            losses.append(found.detach())
            total += self._flat_gradient(found.sum())
        return torch.cat(losses), total / self.examples

    @takes(parameters=(Tensor, "risk.space.vector(model)"))
    def gradient_at(self, parameters: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """∇L of the frozen past function at other parameters."""
        with self.holding(self.space.split(parameters)):
            return self.gradient()

    @in_own_precision
    @torch.enable_grad()
    def summed_gradient(self, inputs: Nested, targets: Nested) -> Float[Tensor, "P"]:
        """Σ_i ∇ℓ_i over one batch."""
        return self._flat_gradient(self.loss.per_example(self.outputs(inputs), targets).sum())

    def _flat_gradient(self, scalar: Tensor) -> Float[Tensor, "P"]:
        parts = torch.autograd.grad(scalar, self.parameters, allow_unused=True, materialize_grads=True)
        return self.space.flatten(list(parts))

    def subset(self, fraction: float, seed: int) -> EmpiricalRisk:
        """The risk of a random `fraction` of the examples, at least one, drawn without replacement by `seed`. Raises
        ValueError for a fraction outside of (0, 1]."""
        return self.select(random_part(self.examples, check_fraction("fraction", fraction), seed))

    @in_own_precision
    def select(self, indices: Tensor) -> EmpiricalRisk:
        """The risk of the examples at sorted `indices`, held in memory in as few batches as their shapes allow."""
        chosen, start = [], 0
        for inputs, targets in self.batches:
            here = indices[(indices >= start) & (indices < start + number_of(targets))] - start
            start += number_of(targets)
            if len(here):
                chosen.append(index((inputs, targets), here))
        return replace(self, batches=merged(chosen))

    def rebatched(self, size: int) -> EmpiricalRisk:
        """The same examples in the same order, in batches of `size`."""
        return replace(self, batches=Rebatched(self.batches, size))

    def at(self, other: EmpiricalRisk) -> EmpiricalRisk:
        """The same examples, loss and forward at the parameters where `other` is frozen."""
        verdicts = other.verdicts if self.forward == other.forward else {}  # another head has other layers
        return replace(self, base=other.base, verdicts=verdicts)

    def frozen_at(self, model: nn.Module) -> EmpiricalRisk:
        """The same examples, loss, forward and selection with a new frozen copy of `model` as the past function. What
        was found out of the old one by trying counts for the new one, too, where both are the same known modules, so
        that nothing but values differs."""
        risk = self.with_base(frozen_copy(model, self.selection))
        drop_hooks(risk)
        if is_plain(self.model) and is_plain(risk.model) and self.space == risk.space:
            movable = {what: verdict for what, verdict in self.verdicts.items() if hasattr(verdict, "in_copy")}
            moved = {what: verdict.in_copy(self.base, risk.base) for what, verdict in movable.items()}
            risk.verdicts.update((what, verdict) for what, verdict in moved.items() if verdict is not None)
        return risk

    @cached_property
    def frozen(self) -> tuple[str, ...]:
        """The names of the parameters outside of the space because they were frozen, and nothing else: they would be
        in it if they had been trainable."""
        return self.selection.frozen(self.base)

    def covering(self, names: Collection[str]) -> EmpiricalRisk:
        """This risk with those parameters of its model in its space, too, whose canonical names are given, even where
        they were frozen or not selected. The risk itself where all are."""
        missing = {*names} - {*self.space.names}
        if not any(canonical_name(name) in missing and p.numel() for name, p in self.base.named_parameters()):
            return self
        base = copied_base(self.base, owned=lambda name: canonical_name(name) in missing)
        for name, parameter in base.named_parameters():
            if canonical_name(name) in missing:
                parameter.requires_grad_(parameter.numel() > 0)
        return self.with_base(base)
