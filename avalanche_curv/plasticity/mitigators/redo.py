"""ReDO: units that are dormant start anew."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from avalanche_curv.core.options import check_seed, is_count, is_number
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.plasticity.mitigators.activity import Activity
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plasticity.mitigators.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.unit_graph import HiddenLayer, UnitGraph, units


class ReDO(Mitigator):
    """Recycles dormant neurons (Sokar et al. 2023, "The dormant neuron phenomenon", Def. 3.1 and Alg. 1).

    Unit i of a hidden layer is dormant where its share of the activity is at most `threshold`:

        s_i = E_x|h_i(x)| / mean_k E_x|h_k(x)| ≤ threshold,

    with h as the layers that read it get it, behind activation, dropout and pooling, and E over the examples (and
    positions) of the training pass before the step; of several readers, it is dormant at each. After every `every`-th
    step the incoming weights and the bias of dormant units are drawn anew from torch's initial distribution,
    U(−1/√fan_in, 1/√fan_in), their outgoing weights set to 0, and what the optimiser keeps of all these is as at its
    start: moments 0, step sizes of `Rprop` the learning rate, averages of `ASGD` the parameters (the factored moments
    of `Adafactor` stay). The scale and shift of a norm layer on the way go back to 1 and 0. Where a unit was silent
    the function stays the same, but for layer and group norm, which share their statistics among units. A layer that
    is dead as a whole is recycled as a whole.

    The source takes a threshold of 0.1 or 0.025 and 1,000 steps, the defaults here; 0 recycles only silent units.

    Which layers read which units is found by torch.fx (see `UnitGraph.of`). `layers` names those that are recycled and
    `left_alone` the other ones with reasons; frozen ones, and those that `include` and `exclude` or the optimiser
    leave out, or whose readers are left out, are not recycled either. `recycled` counts units so far. Among those left
    alone is the layer before Avalanche's `MultiHeadClassifier`, which chooses a head by task labels: `MTSimpleMLP`,
    whose only hidden layer it is, is refused, and deeper models keep that layer as it is. A layer before batch or
    group norm is one that is left alone once a pass shows more axes than those of a batch of vectors or images, whose
    second axis are the units.

    Raises ValueError for a model that cannot be traced or has no hidden layer to recycle, before training where that
    can be seen; RuntimeError where no training pass of the model was seen before a step that recycles.
    """

    def __init__(
        self,
        threshold: float = 0.1,
        *,
        every: int = 1000,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        if not (is_number(threshold) and 0 <= threshold < 1):
            raise ValueError(f"threshold must lie in [0, 1), a share of the mean activity; got {threshold!r}. Try 0.1.")
        if not is_count(every):
            raise ValueError(f"every must be at least 1 step; got {every!r}. The source takes 1,000.")
        check_seed(seed)
        self.threshold, self.every, self.seed = float(threshold), every, seed
        self.graph = UnitGraph((), {})
        self._counts: dict[str, Tensor] = {}
        self._activity = Activity(())
        self._parts: list[int] = []  # of the model that `graph` is of

    @property
    def layers(self) -> tuple[str, ...]:
        """The hidden layers of the model that `prepare` saw, whose units may be recycled."""
        return tuple(layer.name for layer in self.graph.hidden)

    @property
    def left_alone(self) -> dict[str, str]:
        """The other linear layers and convolutions, with reasons."""
        return {**self.graph.others}

    @property
    def recycled(self) -> dict[str, int]:
        """How many units of each layer were recycled so far."""
        return {name: int(count) for name, count in self._counts.items()}

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        parts = [id(part) for part in (*model.modules(), *model.parameters())]
        if parts == self._parts:  # tracing takes as long as some steps, and online streams ask at each of their parts
            return
        self._parts = parts
        self.graph = UnitGraph.of(model)
        self._check_any(model)
        inner = unwrapped(model)
        self._activity = Activity(inner.get_submodule(name) for layer in self.graph.hidden for name in layer.readers)
        self._listen_if_due()

    def release(self) -> None:
        self._activity.stop()
        self._parts = []

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().after_step(model, optimizer)
        if self.steps % self.every == 0:
            self._recycle(model, optimizer)
        self._listen_if_due()

    def _check_any(self, model: nn.Module) -> None:
        if not self.graph.hidden:
            reasons = "; ".join(f"'{name}': {reason}" for name, reason in self.graph.others.items())
            raise ValueError(
                f"{type(model).__name__} has no hidden layer whose units can be recycled ({reasons or 'no layers'}). "
                "Use another mitigator, such as ShrinkAndPerturb."
            )

    def _listen_if_due(self) -> None:
        if (self.steps + 1) % self.every == 0:
            self._activity.start()

    @torch.no_grad()
    def _recycle(self, model: nn.Module, optimizer: Optimizer) -> None:
        """First what enters the units of all layers, then what leaves them."""
        entries = Entries({id(p) for p in self.parameters(model, optimizer).values()}, optimizer)
        draw = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.steps}").getrandbits(32))
        inner = unwrapped(model)
        dormant = {
            layer: mask
            for layer, mask in self._dormant(inner).items()
            if all(entries.may(inner.get_parameter(f"{name}.weight")) for name in (layer.name, *layer.readers))
        }
        for layer, mask in dormant.items():
            renew(inner, layer, mask, entries, draw)
            self._counts[layer.name] = self._counts.get(layer.name, 0) + mask.sum()
        for layer, mask in dormant.items():
            for reader in (inner.get_submodule(name) for name in layer.readers):
                entries.set(reader.weight, columns(reader, mask), 0.0)

    def _dormant(self, model: nn.Module) -> dict[HiddenLayer, Bool[Tensor, "units"]]:
        """Which units are dormant at each reader, of the layers whose readers all had a pass."""
        found: dict[HiddenLayer, Tensor] = {}
        for layer in self.graph.hidden:
            readers = [model.get_submodule(name) for name in layer.readers]
            heard = [sums for sums in map(self._activity.of, readers) if sums is not None]
            if len(heard) < len(readers):
                continue
            if layer.batched and not all(map(self._activity.follows_the_batch, readers)):
                self.graph = self.graph.without(layer, "a norm layer on its way took another axis for its units")
                self._check_any(model)
                continue
            activities = [sums.view(units(model.get_submodule(layer.name)), -1).sum(1) for sums in heard]
            masks = [activity <= self.threshold * activity.mean() for activity in activities]
            found[layer] = torch.stack([mask.to(masks[0].device) for mask in masks]).all(0)
        self._activity.stop()
        if not found:
            raise RuntimeError(
                f"ReDO saw no training pass of {type(model).__name__} before step {self.steps}. Call prepare(model) "
                "after the model has changed, keep gradients on in its passes, and do not compile it: hooks do not "
                "run there."
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_parts": []}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "recycled": self.recycled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts = {name: torch.tensor(count) for name, count in state["recycled"].items()}
        self._listen_if_due()

MOMENTS = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
    "variance", "prev", "sum", "step_size", "ax",
)  # fmt: skip
# what torch's optimisers keep of each entry


class Entries:
    """Entries of the parameters that may be entries, and what the optimiser keeps of them."""

    def __init__(self, chosen: set[int], optimizer: Optimizer) -> None:
        self.chosen, self.optimizer = chosen, optimizer

    def may(self, parameter: Any) -> bool:
        """Whether it is trained, and chosen."""
        return id(parameter) in self.chosen

    def set(self, parameter: Any, mask: Bool[Tensor, "..."], value: Tensor | float) -> None:
        """The value where `mask` holds, and no moments there; nothing for a parameter that may not be entries."""
        if not self.may(parameter):
            return
        value = value.to(parameter) if isinstance(value, Tensor) else torch.full_like(parameter, value)
        parameter.copy_(torch.where(mask, value, parameter))
        kept = self.optimizer.state.get(parameter, {})
        for name in (name for name in MOMENTS if name in kept):
            if isinstance(kept[name], Tensor) and kept[name].shape == parameter.shape:
                kept[name].copy_(torch.where(mask, self._start(name, parameter), kept[name].to(parameter.device)))

    def _start(self, name: str, parameter: Tensor) -> Tensor:
        """What the optimiser begins with."""
        if name == "ax":
            return parameter
        group = next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
        starts = {"step_size": group["lr"], "sum": group.get("initial_accumulator_value", 0.0)}
        return torch.full_like(parameter, float(starts.get(name, 0.0)))


def renew(model: nn.Module, layer: HiddenLayer, mask: Tensor, entries: Entries, draw: torch.Generator) -> None:
    """Incoming weights and biases as at the beginning, and the norm layers that the units pass."""
    own: Any = model.get_submodule(layer.name)
    bound = 1 / math.sqrt(own.weight[0].numel())
    rows = mask.view(-1, *[1] * (own.weight.ndim - 1))
    entries.set(own.weight, rows, _uniform(own.weight.shape, bound, draw))
    if own.bias is not None:
        entries.set(own.bias, mask, _uniform(own.bias.shape, bound, draw))
    for norm in (model.get_submodule(name) for name in layer.norms):
        entries.set(norm.weight, mask, 1.0)
        entries.set(getattr(norm, "bias", None), mask, 0.0)  # RMSNorm has none


def _uniform(shape: torch.Size, bound: float, draw: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=draw)


def columns(reader: Any, mask: Bool[Tensor, "units"]) -> Bool[Tensor, "..."]:
    """The mask at the inputs of a reader, of which each unit has a block where it was flattened."""
    if isinstance(reader, _ConvNd):
        return mask.view(1, -1, *[1] * len(reader.kernel_size))
    return mask.repeat_interleave(reader.in_features // len(mask))
