"""Entries of parameters with the optimiser's state of them, which starts anew where a mitigator replaces them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
    "variance", "prev", "sum", "step_size", "ax",
)  # fmt: skip
# the state that torch's optimisers have of each entry of a parameter


class OptimizedEntries:
    """The entries of selected parameters, by identity, together with the optimiser's state of each entry."""

    def __init__(self, selected: set[int], optimizer: Optimizer) -> None:
        self.selected, self.optimizer = selected, optimizer

    def reset(self, parameter: Any, mask: Bool[Tensor, "..."], value: Tensor | float) -> None:
        """Sets the entries where `mask` holds to `value`, and the optimiser's state of them to its start; does nothing
        for a parameter that is not selected."""
        if id(parameter) not in self.selected:
            return
        value = value.to(parameter) if isinstance(value, Tensor) else torch.full_like(parameter, value)
        parameter.copy_(torch.where(mask, value, parameter))
        state = self.optimizer.state.get(parameter, {})
        for name in (name for name in MOMENTS if name in state):
            if isinstance(state[name], Tensor) and state[name].shape == parameter.shape:
                state[name].copy_(torch.where(mask, self._start(name, parameter), state[name].to(parameter.device)))

    def restart(self, parameter: nn.Parameter) -> None:
        """Sets the optimiser's state of all entries of `parameter` to its start, counts of steps included."""
        self.reset(parameter, torch.ones_like(parameter, dtype=torch.bool), parameter.clone())
        state = self.optimizer.state.get(parameter, {})
        if id(parameter) not in self.selected or not state:
            return
        starts = {"step": 0.0, "mu_product": 1.0, "mu": 1.0, "eta": self._rate(parameter)}  # of NAdam and ASGD
        for name in starts.keys() & state.keys():
            start, kept = starts[name], state[name]
            state[name] = torch.full_like(kept, start) if isinstance(kept, Tensor) else type(kept)(start)

    def _start(self, name: str, parameter: Tensor) -> Tensor:
        """The initial value of the optimiser's state `name` of `parameter`."""
        if name == "ax":
            return parameter
        first = self._group(parameter).get("initial_accumulator_value", 0.0)
        starts = {"step_size": self._rate(parameter), "sum": first}
        return torch.full_like(parameter, float(starts.get(name, 0.0)))

    def _rate(self, parameter: Tensor) -> float:
        return float(self._group(parameter)["lr"])

    def _group(self, parameter: Tensor) -> dict[str, Any]:
        """The options of the optimiser for `parameter`."""
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))
