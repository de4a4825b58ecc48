"""Units of a network begin anew: their weights, and what the optimiser keeps of these."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from avalanche_curv.core.mitigators.unit_graph import HiddenLayer

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
