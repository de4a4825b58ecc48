"""Which parameters lie in layers whose per-example gradients follow from what enters and leaves the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.jacobians import gradients
from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_name
from avalanche_curv.core.risk.trust import TOLERANCE, nearby

T = TypeVar("T")


@dataclass(eq=False)
class Tap:
    """One layer in one forward pass: its inputs A and outputs Z, [N, in] and [N, out] in a multilayer perceptron."""

    layer: nn.Module
    inputs: Tensor
    outputs: Tensor

    @cached_property
    def input_squares(self) -> Float[Tensor, "5 N"]:
        """a·a, a'·a', a·a', a'·e and e·e for inputs that do not change: a' = a and e = 0."""
        squares, zeros = torch.linalg.vecdot(self.inputs, self.inputs), self.inputs.new_zeros(len(self.inputs))
        return torch.stack([squares, squares, squares, zeros, zeros])


@dataclass(frozen=True)
class Layers:
    """The layers of a frozen model that explain their parameters' per-example gradients, and `rest`: the names of the
    parameters that none explains.

    A layer is taken only if it reproduces the gradients of single examples on a few of the data: one that is called
    twice, shares a tensor, is bypassed, or mixes examples falls out by itself, whatever it is. A layer that turns out
    to see other examples otherwise falls out then (`by_layers`).
    """

    space: ParameterSpace
    names: dict[nn.Module, str]
    rest: tuple[str, ...] = ()
    folded: dict[nn.Module, tuple[int, ...]] = field(default_factory=dict)  # how many rows an example has, in and out
    flat: frozenset[nn.Module] = frozenset()  # linear layers on matrices: one position an example
    bytes_an_example: int = 0  # of what leaves the layers

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> Layers:
        """The layers of the risk's model, looked for once."""
        if "layers" not in risk.verdicts:
            risk.verdicts["layers"] = cls._candidates(risk)._explaining(risk)
        return risk.verdicts["layers"]

    @classmethod
    def _candidates(cls, risk: EmpiricalRisk) -> Layers:
        known = ((n, m) for n, m in risk.base.named_modules() if layer_kinds.is_known(m))
        found = {m: canonical_name(f"{n}.weight").removesuffix("weight").removesuffix(".") for n, m in known}
        tried = cls(risk.space, {})
        for layer, name in found.items():
            candidate = replace(tried, names={layer: name})
            trainable = candidate.trainable(layer)
            if trainable and set(trainable) <= set(risk.space.names):
                tried.names[layer] = name
        return tried

    def without(self, layer: nn.Module) -> Layers:
        """These layers but for one, whose parameters join the rest."""
        names = {one: name for one, name in self.names.items() if one is not layer}
        freed = {*self.rest, *self.trainable(layer)}
        return replace(
            self, names=names, rest=tuple(name for name in self.space.names if name in freed), flat=self.flat - {layer}
        )

    def trainable(self, layer: nn.Module) -> list[str]:
        """The names of the trainable parameters of `layer`."""
        prefix = f"{self.names[layer]}." if self.names[layer] else ""
        return [prefix + name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]

    def places(self, layer: nn.Module) -> dict[str, str]:
        """The names of the layer's trainable parameters in the model, by their names in it, such as "weight"."""
        return {name.rpartition(".")[2]: name for name in self.trainable(layer)}

    @contextmanager
    def tapped(self) -> Iterator[list[Tap]]:
        """Collects a tap for each call of a layer while the context is open."""
        taps: list[Tap] = []

        def collect(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            taps.append(Tap(layer, (*args, *named.values())[0].detach(), output))
            return output.clone()  # what follows may write in place

        handles = [layer.register_forward_hook(collect, with_kwargs=True) for layer in self.names]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention lack second derivatives
                yield taps
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, tap: Tap, sensitivity: Tensor, examples: int) -> dict[str, Tensor]:
        """Per-example gradients in the layer's trainable parameters, [N, *shape]; empty where no form is known."""
        ready = layer_kinds.prepared(tap.layer, tap.inputs, examples)
        if ready is None:
            return {}
        return self._named(tap.layer, layer_kinds.rows(tap.layer, ready, sensitivity, examples))

    def squares(self, tap: Tap, columns: Sequence[Tensor], examples: int) -> dict[str, Tensor]:
        """Σ_r Σ_i (∇s_ir)² in the layer's trainable parameters, from its sensitivity to each s_r."""
        return self._named(tap.layer, layer_kinds.squares(tap.layer, tap.inputs, columns, examples))

    def _named(self, layer: nn.Module, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.places(layer)
        return {wanted[short]: part for short, part in parts.items() if short in wanted}

    def check_calls(self, taps: list[Tap], examples: int) -> None:
        """Raises LayerDiffers unless each layer is called once, or never, with as many rows an example as for the
        examples on which it was tried."""
        called = [tap.layer for tap in taps]
        for tap in taps:
            rows = tuple(n * examples for n in self.folded.get(tap.layer, ()))
            if called.count(tap.layer) > 1 or rows != (len(tap.inputs), len(tap.outputs)):
                raise LayerDiffers(tap.layer)

    @torch.enable_grad()
    def _explaining(self, risk: EmpiricalRisk) -> Layers:
        """Those of the layers that reproduce the gradients of single examples on a few of them.

        These are gradients of fixed combinations of the outputs at parameters close by.
        """
        try:
            with risk.holding(nearby(risk)):
                return self._tried(risk)
        except Exception:  # of any kind: a layer that is called by torch.func, say, cannot be tapped
            return Layers(self.space, {}, self.space.names)

    def _tried(self, risk: EmpiricalRisk) -> Layers:
        inputs, _ = risk.few
        with self.tapped() as taps:
            outputs = risk.outputs(inputs)
        examples, mixed = len(outputs), outputs @ torch.linspace(1, 2, outputs.shape[1]).to(outputs)
        called = [tap.layer for tap in taps]
        kept = [tap for tap in taps if called.count(tap.layer) == 1 and _divides(examples, tap)]
        sensitivities = dict(zip(kept, gradients(mixed.sum(), [tap.outputs for tap in kept])))
        used: set[str] = set()
        for index, one in enumerate(mixed):
            exact = dict(zip(risk.space.names, gradients(one, risk.parameters)))
            used |= {name for name, part in exact.items() if part.any()}
            kept = [tap for tap in kept if self._explains(tap, sensitivities[tap], examples, index, exact)]
        unused = [layer for layer in self.names if layer not in called and not used & set(self.trainable(layer))]
        layers = [*(tap.layer for tap in kept), *unused]
        explained = {name for layer in layers for name in self.trainable(layer)}
        return Layers(
            self.space,
            {layer: self.names[layer] for layer in layers},
            tuple(name for name in self.space.names if name not in explained),
            {tap.layer: tuple(len(t) // examples for t in (tap.inputs, tap.outputs)) for tap in kept},
            frozenset(
                layer for layer in layers
                if isinstance(layer, nn.Linear)
                and all(tap.inputs.ndim == 2 and len(tap.inputs) == examples for tap in kept if tap.layer is layer)
            ),
            sum(tap.outputs.nbytes for tap in kept) // examples,
        )

    def _explains(
        self, tap: Tap, sensitivity: Tensor, examples: int, index: int, exact: dict[str, Tensor]
    ) -> bool:
        """Whether the rows of one of the examples are its exact gradient."""
        try:
            found = self.rows(tap, sensitivity, examples)
        except RuntimeError:  # inputs or outputs in other shapes than the kind of layer has
            return False
        return all(
            name in found
            and found[name].shape == (examples, *exact[name].shape)
            and bool((found[name][index] - exact[name]).norm() <= TOLERANCE * exact[name].norm())
            for name in self.trainable(tap.layer)
        )


class LayerDiffers(Exception):
    """A layer is called otherwise for some examples than for those on which it was tried."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.layer = layer


def by_layers(risk: EmpiricalRisk, compute: Callable[[Layers], T]) -> T:
    """What `compute` makes of the layers of a risk: where it meets one that is called otherwise for other examples,
    once more without that layer."""
    while True:
        layers = Layers.of(risk)
        try:
            return compute(layers)
        except LayerDiffers as found:
            risk.verdicts["layers"] = layers.without(found.layer)


def linear_layers(risk: EmpiricalRisk) -> Layers | None:
    """The layers of a model all of whose trainable parameters lie in linear layers on matrices; None for any other."""
    layers = Layers.of(risk)
    return None if layers.rest or layers.flat != set(layers.names) else layers


def _divides(count: int, tap: Tap) -> bool:
    return all(t.ndim > 0 and len(t) > 0 and len(t) % count == 0 for t in (tap.inputs, tap.outputs))
