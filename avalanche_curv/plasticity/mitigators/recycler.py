"""Recycling of hidden units: their incoming weights are drawn anew and their outgoing ones set to 0."""

from __future__ import annotations

import math
import random
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.options import Fixed, Setting, check_seed
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.core.risk.selection import ParameterSelector, in_words
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plasticity.mitigators.optimized_entries import OptimizedEntries
from avalanche_curv.plasticity.mitigators.unit_graph import HiddenLayer, UnitGraph, units


def check_next_layers(name: str, value: Any) -> dict[str, tuple[str, ...]] | None:
    """`value`, a mapping from names of layers to one or several names, with tuples of these. Raises TypeError for
    another value."""
    if value is None:
        return None
    found: dict[Any, tuple[Any, ...]] = {}
    if isinstance(value, Mapping):
        for key, names in value.items():
            found[key] = (names,) if not isinstance(names, Iterable) or isinstance(names, str) else tuple(names)
    if not found or not all(isinstance(one, str) for key, names in found.items() for one in (key, *names)):
        raise TypeError(
            f"{name} takes, for each hidden layer by name, the names of the modules that its units reach, such as "
            f"{{'fc1': ['fc2'], 'fc2': ['policy', 'value']}}; got {value!r}."
        )
    return found


class Recycler(Mitigator):
    """Recycles units of hidden layers, by what reaches the next layers in the training passes before a step.

    The incoming weights and the bias of a unit are drawn anew from torch's initial distribution,
    U(−1/√fan_in, 1/√fan_in), its outgoing weights set to 0, and the optimiser's state of all these is that of its
    start: moments 0, step sizes of `Rprop` the learning rate, averages of `ASGD` the parameters (the factored moments
    of `Adafactor` stay). The scale and shift of a norm layer in between go back to 1 and 0. Where a unit was silent
    the function stays the same, but for layer and group norm, which share their statistics among units.

    Which layers read which units is traced by torch.fx (see `UnitGraph.of`). For a model that cannot be traced, as with
    branches on the values of its inputs, or to choose, `next_layers` says it by names: for each hidden layer the norm
    layers that its units pass and all linear layers and convolutions that read them,

        ReDO(next_layers={"encoder.0": ["encoder.1", "encoder.3"], "encoder.3": ["policy", "value"]})

    with nothing in between that mixes units, no other reader, and no second call in a pass, which is not checked
    (`UnitGraph.named`). Activities are then those that reach the layers named. A layer is looked at in steps in whose
    passes all of its readers took part: of a model that calls one of several heads, name the layers before them alone.

    `layers` names those that are recycled and `left_alone` the other ones with reasons; frozen ones, and those that
    `include` and `exclude` or the optimiser leave out, or whose readers are left out, are not recycled either, with a
    warning where that leaves none. `recycled` counts units so far. Among those left alone is the layer before
    Avalanche's `MultiHeadClassifier`, which chooses a head by task labels: `MTSimpleMLP`, whose only hidden layer it
    is, is refused, and deeper models keep that layer as it is. A layer before batch or group norm is one that is left
    alone once a pass shows more axes than those of a batch of vectors or images, whose second axis are the units.

    Raises TypeError for `next_layers` that is no mapping of names; ValueError for names that do not fit the model and
    for a model that cannot be traced or has no hidden layer to recycle, before training where that can be seen;
    RuntimeError where no training pass of the model was seen before a step that recycles.

    A new one defines `looks_at` and `to_recycle`.
    """

    seed = Setting(check_seed)
    next_layers = Fixed[dict[str, tuple[str, ...]] | None](check_next_layers)

    def __init__(
        self,
        *,
        next_layers: Mapping[str, str | Iterable[str]] | None,
        include: Iterable[ParameterSelector],
        exclude: Iterable[ParameterSelector],
        seed: int,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.seed = seed
        self.next_layers = next_layers
        self._graph = UnitGraph((), {})
        self._due = -1  # the step after which units are recycled, whose passes are recorded
        self._counts: dict[str, Tensor] = {}
        self._activity = InputActivity(())
        self._model_parts: list[int] = []  # identities of modules and parameters that `graph` was traced from

    @abstractmethod
    def looks_at(self, step: int) -> bool:
        """Whether units may be recycled after the optimiser's step of this number, from 1."""

    @abstractmethod
    def to_recycle(
        self, activities: Mapping[HiddenLayer, list[Float[Tensor, "units"]]]
    ) -> dict[HiddenLayer, Bool[Tensor, "units"]]:
        """The units to recycle of each layer, by Σ|h| over the examples and positions of the passes before the step, at
        each of the layer's readers. Layers that may not be changed, or were not passed, are left out."""

    @property
    def graph(self) -> UnitGraph:
        """Which layers read the units of which, in the model that `prepare` saw."""
        return self._graph

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the hidden layers whose units may be recycled, in the model that `prepare` saw."""
        return tuple(layer.name for layer in self.graph.hidden)

    @property
    def left_alone(self) -> dict[str, str]:
        """The other linear layers and convolutions by name, with the reasons why their units are not recycled."""
        return {**self.graph.others}

    @property
    def recycled(self) -> dict[str, int]:
        """The number of units of each layer that were recycled so far."""
        return {name: int(count) for name, count in self._counts.items()}

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        parts = [id(part) for part in (*model.modules(), *model.parameters())]
        if parts == self._model_parts:  # tracing takes as long as some steps, and online streams prepare often
            return
        self._model_parts = parts
        self._graph = UnitGraph.of(model) if self.next_layers is None else UnitGraph.named(model, self.next_layers)
        self._check_any(model)
        inner, selected = unwrapped(model), {id(p) for p in self.parameters(model).values()}
        if not any(_weights(inner, layer) <= selected for layer in self.graph.hidden):
            warnings.warn(
                f"{type(self).__name__} recycles no unit of {type(model).__name__} as it is: of each hidden layer "
                f"({in_words(self.layers)}) its weight, or that of a layer that reads it, is frozen or left out by "
                "include and exclude. Let both be selected, and train, of one.",
                UserWarning,
                stacklevel=outside(),
            )
        readers = [inner.get_submodule(name) for layer in self.graph.hidden for name in layer.readers]
        before, self._activity = self._activity, InputActivity(readers)
        self._record_if_due()
        self._activity.go_on_from(before)

    def before_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._take_over(model)

    def _take_over(self, model: nn.Module) -> None:
        """Prepares a copy that was made between the pass and the end of the step."""
        if not self._model_parts:
            self.prepare(model)

    def release(self) -> None:
        self._activity.stop()
        self._model_parts = []

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._take_over(model)
        super().after_step(model, optimizer)
        if self.steps == self._due:
            self._recycle(model, optimizer)
        self._record_if_due()

    def _check_any(self, model: nn.Module) -> None:
        if not self.graph.hidden:
            reasons = "; ".join(f"'{name}': {reason}" for name, reason in self.graph.others.items())
            raise ValueError(
                f"{type(model).__name__} has no hidden layer whose units can be recycled ({reasons or 'no layers'}). "
                "Use another mitigator, such as ShrinkAndPerturb."
            )

    def _record_if_due(self) -> None:
        if self.looks_at(self.steps + 1):
            self._due = self.steps + 1
            self._activity.start()

    @torch.no_grad()
    def _recycle(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Reinitialises units of all layers: first their incoming weights, then their outgoing ones."""
        selected = {id(p) for p in self.parameters(model, optimizer).values()}
        entries = OptimizedEntries(selected, optimizer)
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.steps}").getrandbits(32))
        inner = unwrapped(model)
        activities = self._activities(inner)
        found = self.to_recycle({layer: s for layer, s in activities.items() if _weights(inner, layer) <= selected})
        for layer, mask in found.items():
            reinitialize(inner, layer, mask, entries, generator)
            self._counts[layer.name] = self._counts.get(layer.name, 0) + mask.sum()
        for layer, mask in found.items():
            for reader in (inner.get_submodule(name) for name in layer.readers):
                entries.reset(reader.weight, input_mask(reader, mask), 0.0)

    def _activities(self, model: nn.Module) -> dict[HiddenLayer, list[Float[Tensor, "units"]]]:
        """Σ|h| of the units of each hidden layer all of whose readers took part in a training pass, at each reader."""
        found: dict[HiddenLayer, list[Tensor]] = {}
        for layer in self.graph.hidden:
            readers = [model.get_submodule(name) for name in layer.readers]
            recorded = [sums for sums in map(self._activity.of, readers) if sums is not None]
            if len(recorded) < len(readers):
                continue
            if layer.batched and not all(map(self._activity.follows_batch_axis, readers)):
                self._graph = self.graph.without(layer, "a norm layer on its way took another axis for its units")
                self._check_any(model)
                continue
            found[layer] = [sums.view(units(model.get_submodule(layer.name)), -1).sum(1) for sums in recorded]
        self._activity.stop()
        if not found:
            raise RuntimeError(
                f"{type(self).__name__} saw no training pass of {type(model).__name__} before step {self.steps} in "
                "which all readers of a layer took part. Call prepare(model) after the model has changed, keep "
                "gradients on in its passes, and do not compile it: hooks do not run there."
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_model_parts": []}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "recycled": self.recycled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts = {name: torch.tensor(count) for name, count in state["recycled"].items()}
        self._record_if_due()


def _weights(model: nn.Module, layer: HiddenLayer) -> set[int]:
    """The weights of a hidden layer and of its readers, by identity."""
    return {id(model.get_parameter(f"{name}.weight")) for name in (layer.name, *layer.readers)}


def reinitialize(
    model: nn.Module, layer: HiddenLayer, mask: Tensor, entries: OptimizedEntries, generator: torch.Generator
) -> None:
    """Draws the incoming weights and biases of the units in `mask` anew, and resets the norm layers they pass."""
    own: Any = model.get_submodule(layer.name)
    bound = 1 / math.sqrt(own.weight[0].numel())
    rows = mask.view(-1, *[1] * (own.weight.ndim - 1))
    entries.reset(own.weight, rows, _uniform(own.weight.shape, bound, generator))
    if own.bias is not None:
        entries.reset(own.bias, mask, _uniform(own.bias.shape, bound, generator))
    for norm in (model.get_submodule(name) for name in layer.norms):
        entries.reset(norm.weight, mask, 1.0)
        entries.reset(getattr(norm, "bias", None), mask, 0.0)  # RMSNorm has none


def _uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def input_mask(reader: Any, mask: Bool[Tensor, "units"]) -> Bool[Tensor, "..."]:
    """The inputs of `reader` that come from the units in `mask`: several for each unit where it was flattened."""
    if isinstance(reader, _ConvNd):
        return mask.view(1, -1, *[1] * len(reader.kernel_size))
    return mask.repeat_interleave(reader.in_features // len(mask))


def at_all(
    sums: list[Float[Tensor, "units"]], holds: Callable[[Float[Tensor, "units"]], Bool[Tensor, "units"]]
) -> Bool[Tensor, "units"]:
    """For which units something holds at each of the readers, which may lie on several devices."""
    masks = [holds(activity) for activity in sums]
    return torch.stack([mask.to(masks[0].device) for mask in masks]).all(0)


class InputActivity:
    """Sums |h| over examples and positions for each input unit of `layers`, which are linear or convolutional.

    Forward passes that autograd records are summed from `start` to `stop`. The hook is torch's global one, and layers
    are told apart by identity, so that copies and pickles of the model made meanwhile contain no hooks.

    A copy or pickle made while sums are taken has no layers, but holds the sums, for `go_on_from`.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._copied: list[tuple[Tensor | None, set[int]]] = []  # sums and axes, in the order of the layers
        self._sums: weakref.WeakKeyDictionary[nn.Module, Tensor | None] = weakref.WeakKeyDictionary()
        self._axes: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()
        for layer in layers:
            self._sums[layer], self._axes[layer] = None, set()
        self._release: Callable[[], object] | None = None

    def start(self) -> None:
        """Sums passes from now on, beginning with zero."""
        self.stop()
        for layer in [*self._sums]:
            self._sums[layer], self._axes[layer] = None, set()
        record = weakref.WeakMethod(self._record)

        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            method = record()
            mapped = any(is_functorch_wrapped_tensor(x) for x in (*args, *options.values()) if isinstance(x, Tensor))
            if method is not None and torch.is_grad_enabled() and not mapped:
                method(module, *args[:1], **options)

        handle = register_module_forward_hook(hook, with_kwargs=True)
        self._release = weakref.finalize(self, handle.remove)

    def stop(self) -> None:
        """Ends summing; the sums stay."""
        if self._release is not None:
            self._release()
            self._release = None

    def of(self, layer: nn.Module) -> Float[Tensor, "inputs"] | None:
        """The sums for the input units of `layer`; None where it had no pass."""
        return self._sums.get(layer)

    def follows_batch_axis(self, layer: nn.Module) -> bool:
        """Whether the input units of `layer` were always on the second axis, behind that of the batch."""
        return self._axes.get(layer) == {1}

    def go_on_from(self, copied: InputActivity) -> None:
        """Adds to the sums that a copy or pickle holds, of these layers in another place, where sums are taken."""
        if self._release is not None and len(copied._copied) == len(self._sums):
            for layer, (sums, axes) in zip([*self._sums], copied._copied):
                self._sums[layer], self._axes[layer] = sums, set(axes)

    def __reduce__(self) -> tuple[type[InputActivity], tuple[tuple[()]], dict[str, Any]]:
        """Copies and pickles have no layers, which are known by identity."""
        going = self._release is not None
        return InputActivity, ((),), {"_copied": [*zip(self._sums.values(), self._axes.values())] if going else []}

    def _record(self, module: nn.Module, *args: Any, **options: Any) -> None:
        if module not in self._sums:
            return
        inputs: Tensor = args[0] if args else options["input"]
        axis = inputs.ndim - 1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        others = [n for n in range(inputs.ndim) if n != axis]
        size = inputs.detach().abs()
        total = size.sum(others, dtype=torch.float32 if size.element_size() < 4 else size.dtype) if others else size
        before = self._sums[module]
        self._sums[module] = total if before is None else before + total
        self._axes[module].add(axis)
