"""Which parameters lie in layers whose per-example gradients follow from what enters and leaves the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example.taps import Places, Tap, Tied, TiedTap
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.jacobians import gradients
from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_name
from avalanche_curv.core.risk.trust import TOLERANCE, nearby

T = TypeVar("T")

ROUNDING = 64  # of units in the last place of a layer's gradient


@dataclass(frozen=True)
class Layers:
    """The layers of a frozen model that explain their parameters' per-example gradients, and `rest`: the names of the
    parameters that none explains.

    A layer is taken only if it reproduces the gradients of single examples on a few of the data: one that is bypassed
    or mixes examples falls out by itself, whatever it is. Layers that share a parameter, and calls of one layer, are
    taken together (`Tied`). What an embedding gives to all examples alike, such as positions, is repeated for each of
    them (`repeated`). A layer that turns out to see other examples otherwise falls out then (`by_layers`).
    """

    space: ParameterSpace
    names: dict[nn.Module, str]
    rest: tuple[str, ...] = ()
    folded: dict[nn.Module, tuple[int, ...]] = field(default_factory=dict)  # how many rows an example has, in and out
    flat: frozenset[nn.Module] = frozenset()  # linear layers on matrices: one position an example
    bytes_an_example: int = 0  # of what leaves the layers
    owned: dict[nn.Module, Places] = field(default_factory=dict)
    repeated: frozenset[nn.Module] = frozenset()

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
        of = {id(p): canonical_name(name) for name, p in risk.base.named_parameters() if p.requires_grad}
        tried = cls(risk.space, {})
        for layer, name in found.items():
            own = layer.named_parameters(recurse=False)
            places = {short: of[id(p)] for short, p in own if id(p) in of}
            if places and set(places.values()) <= set(risk.space.names):
                tried.names[layer], tried.owned[layer] = name, places
        return tried

    def in_copy(self, old: nn.Module, new: nn.Module) -> Layers | None:
        """These layers of the model `old` as those of another one of the same parameters, `new`; None where the two are
        not made of the same modules, and where layers are tied."""
        before, after = ([*model.named_modules()] for model in (old, new))
        same = [(name, type(module)) for name, module in before] == [(name, type(module)) for name, module in after]
        if not same or any(isinstance(layer, Tied) for layer in self.names):
            return None
        place = {a: b for (_, a), (_, b) in zip(before, after)}
        return replace(
            self,
            names={place[layer]: name for layer, name in self.names.items()},
            folded={place[layer]: rows for layer, rows in self.folded.items()},
            flat=frozenset(place[layer] for layer in self.flat),
            owned={place[layer]: places for layer, places in self.owned.items()},
            repeated=frozenset(place[layer] for layer in self.repeated),
        )

    def without(self, layer: nn.Module) -> Layers:
        """These layers but for one, whose parameters join the rest."""
        names = {one: name for one, name in self.names.items() if one is not layer}
        freed = {*self.rest, *self.trainable(layer)}
        return replace(
            self, names=names, rest=tuple(name for name in self.space.names if name in freed), flat=self.flat - {layer}
        )

    def trainable(self, layer: nn.Module) -> list[str]:
        """The names of the trainable parameters of `layer`."""
        return [*self.owned[layer].values()]

    @contextmanager
    def tapped(self, examples: int, *, once: bool = False) -> Iterator[list[Tap]]:
        """Collects a tap for each layer that is called on this number of examples while the context is open. What
        leaves the model can be differentiated twice, or `once`, by the fused kernels of attention."""
        taps: list[Tap] = []
        tied = {layer: one for one in self.names if isinstance(one, Tied) for layer in one.calls}

        def collect(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            inputs = (*args, *named.values())[0].detach()
            if layer in self.repeated:
                output, inputs = (_for_each(t, examples, alike=inputs.ndim == 1) for t in (output, inputs))
            _collect(taps, Tap(layer, inputs, output), tied.get(layer))
            return output.clone(memory_format=_layout(layer, output))  # what follows may write in place

        called = [layer for one in self.names for layer in (one.calls if isinstance(one, Tied) else (one,))]
        handles = [layer.register_forward_hook(collect, with_kwargs=True) for layer in dict.fromkeys(called)]
        try:
            with nullcontext() if once else sdpa_kernel(SDPBackend.MATH):  # fused kernels lack second derivatives
                yield taps
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, tap: Tap, sensitivity: Any, examples: int) -> dict[str, Tensor]:
        """Per-example gradients in the layer's trainable parameters, [N, *shape]; empty where no form is known."""
        return self._named(tap.layer, tap.rows(sensitivity, examples))

    def squares(self, tap: Tap, columns: Sequence[Any], examples: int) -> dict[str, Tensor]:
        """Σ_r Σ_i (∇s_ir)² in the layer's trainable parameters, from its sensitivity to each s_r."""
        return self._named(tap.layer, tap.squares(columns, examples))

    def _named(self, layer: nn.Module, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = self.owned[layer]
        return {wanted[short]: part for short, part in parts.items() if short in wanted}

    def check_calls(self, taps: list[Tap], examples: int) -> None:
        """Raises LayerDiffers unless each layer is called once, or never, with as many rows an example as for the
        examples on which it was tried."""
        called = [tap.layer for tap in taps]
        for tap in taps:
            rows = tuple(n * examples for n in self.folded.get(tap.layer, ()))
            if called.count(tap.layer) > 1 or rows != tap.lengths:
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
        inputs, targets = risk.few
        examples = number_of(targets)
        with self.tapped(examples) as calls:
            outputs = risk.outputs(inputs)
        kept, used = self._explained(risk, outputs, self._united(calls), examples)
        called = {tap.layer for tap in calls}
        explained_layers = {tap.layer for tap in kept}
        alike = frozenset(one for one in called - explained_layers if isinstance(one, nn.Embedding))
        kept += self._explained_alike(risk, inputs, outputs, alike, examples)
        explained = {name for tap in kept for name in self.trainable(tap.layer)}
        unused = []
        for layer in self.names:
            if layer not in called and not (used | explained) & {*self.trainable(layer)}:
                unused.append(layer)
                explained |= {*self.trainable(layer)}
        layers = [*(tap.layer for tap in kept), *unused]
        return Layers(
            self.space,
            {layer: self.names[layer] for layer in layers},
            tuple(name for name in self.space.names if name not in explained),
            {tap.layer: tuple(length // examples for length in tap.lengths) for tap in kept},
            frozenset(
                layer for layer in layers
                if isinstance(layer, nn.Linear)
                and all(tap.inputs.ndim == 2 and len(tap.inputs) == examples for tap in kept if tap.layer is layer)
            ),
            sum(end.nbytes for tap in kept for end in tap.ends) // examples,
            self.owned,
            alike & {tap.layer for tap in kept},
        )

    def _united(self, calls: list[Tap]) -> list[Tap]:
        """One tap for all calls that share a parameter, in the order of the first of them."""
        shared: list[set[str]] = []
        for tap in calls:
            names = {*self.trainable(tap.layer)}
            joined = names.union(*(other for other in shared if other & names))
            shared = [*(other for other in shared if not other & names), joined]
        groups: dict[int, list[Tap]] = {}
        for tap in calls:
            key = next(i for i, names in enumerate(shared) if self.trainable(tap.layer)[0] in names)
            groups.setdefault(key, []).append(tap)
        return [taps[0] if len(taps) == 1 else self._tied(taps) for taps in groups.values()]

    def _tied(self, taps: list[Tap]) -> Tap:
        layer = Tied([tap.layer for tap in taps], self.owned)
        self.names[layer] = self.names[taps[0].layer]
        self.owned[layer] = {name: name for tap in taps for name in self.trainable(tap.layer)}
        return TiedTap.of(layer, taps)

    def _explained_alike(
        self, risk: EmpiricalRisk, inputs: Tensor, outputs: Tensor, alike: frozenset[nn.Module], examples: int
    ) -> list[Tap]:
        """The taps of tables whose output for all examples alike can be repeated for each of them."""
        if not alike:
            return []
        names = {layer: name for layer, name in self.names.items() if layer in alike}
        tried = replace(self, names=names, repeated=alike)
        try:
            with tried.tapped(examples) as taps:
                repeated = risk.outputs(inputs)
        except Exception:  # of any kind: what follows cannot take one more axis, say
            return []
        called = [tap.layer for tap in taps]
        if repeated.shape != outputs.shape or bool((repeated - outputs).norm() > TOLERANCE * outputs.norm()):
            return []
        once = [tap for tap in taps if called.count(tap.layer) == 1]
        return tried._explained(risk, repeated, once, examples)[0]

    def _explained(
        self, risk: EmpiricalRisk, outputs: Tensor, taps: list[Tap], examples: int
    ) -> tuple[list[Tap], set[str]]:
        """Those of the taps whose rows are the gradients of each example, and the parameters that have any gradient."""
        mixed = outputs @ torch.linspace(1, 2, outputs.shape[1]).to(outputs)
        kept = [tap for tap in taps if all(length > 0 and length % examples == 0 for length in tap.lengths)]
        found = dict(zip(kept, sensitivities(mixed.sum(), kept)))
        used: set[str] = set()
        for index, one in enumerate(mixed):
            exact = dict(zip(risk.space.names, gradients(one, risk.parameters)))
            used |= {name for name, part in exact.items() if part.any()}
            kept = [tap for tap in kept if self._explains(tap, found[tap], examples, index, exact)]
        return kept, used

    def _explains(
        self, tap: Tap, sensitivity: Any, examples: int, index: int, exact: dict[str, Tensor]
    ) -> bool:
        """Whether the rows of one of the examples are its exact gradient, to rounding: the bias of the keys of an
        attention, for instance, has none but that."""
        try:
            found = self.rows(tap, sensitivity, examples)
        except RuntimeError:  # inputs or outputs in other shapes than the kind of layer has
            return False
        names = self.trainable(tap.layer)
        norms = {name: float(exact[name].norm()) for name in names}
        floor = ROUNDING * torch.finfo(exact[names[0]].dtype).eps * max(norms.values())
        return all(
            name in found
            and found[name].shape == (examples, *exact[name].shape)
            and float((found[name][index] - exact[name]).norm()) <= TOLERANCE * norms[name] + floor
            for name in names
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


def sensitivities(scalar: Tensor, taps: Sequence[Tap], weight: Tensor | None = None) -> list[Any]:
    """∂(scalar)/∂Z of each tap, or of weightᵀ(scalar) for several: what `rows` and `squares` take."""
    derivatives = iter(gradients(scalar, [end for tap in taps for end in tap.ends], weight))
    return [tap.among(derivatives) for tap in taps]


def _collect(taps: list[Tap], tap: Tap, tied: Tied | None) -> None:
    """Appends a tap, or joins it to those of other calls that it is tied to."""
    if tied is None:
        taps.append(tap)
        return
    known = next((one for one in taps if one.layer is tied), None)
    if isinstance(known, TiedTap):
        known.taps.append(tap)
    else:
        taps.append(TiedTap.of(tied, [tap]))


def _layout(layer: nn.Module, output: Tensor) -> torch.memory_format:
    """Channels last for images on a processor, where convolutions back through it take two thirds of the time."""
    on_processor = isinstance(layer, nn.Conv2d) and output.device.type == "cpu" and output.ndim == 4
    return torch.channels_last if on_processor else torch.preserve_format


def _for_each(tensor: Tensor, examples: int, *, alike: bool) -> Tensor:
    """A tensor for all examples alike once for each of them; without `alike` it has an axis of examples already."""
    return tensor.expand(examples, *(tensor.shape if alike else tensor.shape[1:]))
