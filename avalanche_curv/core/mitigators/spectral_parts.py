"""The parameters of a network cut into the parts that spectral regularisation treats alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avalanche_curv.core.mitigators.gradients import gradient_of, in_full
from avalanche_curv.core.mitigators.power_iteration import Pair
from avalanche_curv.core.mitigators.roles import Adds, Multiplies, Role, Scales


@dataclass(frozen=True)
class Part:
    """One block of a parameter."""

    name: str
    role: Role
    parameter: nn.Parameter
    block: int

    def value(self) -> Tensor:
        """The block, in float32 at least."""
        return in_full(self.role.tensors(self.parameter)[self.block])

    def gradient(self) -> Tensor:
        """The block of the parameter's gradient, to be changed in place."""
        return self.role.tensors(gradient_of(self.parameter))[self.block]


class Group:
    """Parts on one device and in one precision, by role."""

    def __init__(self, device: torch.device, parts: Sequence[Part], pairs: dict[str, Pair]) -> None:
        self.device = device
        self.weights = [part for part in parts if isinstance(part.role, Multiplies)]
        self.shifts = [part for part in parts if isinstance(part.role, Adds)]
        self.scales = [part for part in parts if isinstance(part.role, Scales)]
        self.pairs = [pairs[part.name] for part in self.weights]

    def matrices(self) -> list[Tensor]:
        """The weights, each of d_out × the rest."""
        return [part.value().flatten(1) for part in self.weights]


def add_outer(tensor: Tensor, u: Tensor, v: Tensor) -> None:
    """tensor += u vᵀ, of whatever layout and precision."""
    flat = tensor.flatten(1)
    if flat.data_ptr() == tensor.data_ptr() and flat.dtype == u.dtype:
        flat.addr_(u, v)
    else:  # `flatten` has made a copy, as of convolutions in channels-last layout
        tensor += torch.outer(u, v).view(tensor.shape).to(tensor.dtype)
