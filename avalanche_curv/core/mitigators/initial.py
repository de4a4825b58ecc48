"""Initial parameters: their values when first seen, and the distributions that torch draws them from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from avalanche_curv.core.mitigators.roles import Adds, Multiplies, Scales, role_of


class FirstSeen:
    """θ0 by canonical name: each entry as it was when it first appeared.

    Where a parameter has grown, the entries that it had keep their values and the new ones count from now on. One that
    comes back smaller, or with other axes, is another parameter and is seen anew.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Look at parameters that may be new, or have new entries."""
        for name, parameter in parameters.items():
            known = self.values.get(name)
            if known is None or known.shape != parameter.shape:
                self.values[name] = grown(known, parameter.detach())

    def of(self, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """Their first values, on their devices and in their dtypes."""
        self.remember(parameters)
        for name, parameter in parameters.items():
            self.values[name] = self.values[name].to(parameter)
        return [self.values[name] for name in parameters]


def grown(known: Tensor | None, like: Tensor) -> Tensor:
    """A copy of `like` with `known` in its first corner; just the copy where nothing is known or it does not fit.

    >>> import torch
    >>> grown(torch.tensor([1.0, 2.0]), torch.zeros(3))
    tensor([1., 2., 0.])
    """
    result = like.clone()
    if known is not None and known.ndim == like.ndim and all(old <= new for old, new in zip(known.shape, like.shape)):
        result[tuple(slice(0, n) for n in known.shape)] = known.to(like)
    return result


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of their own, by the same names."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def initial_laws(model: nn.Module) -> dict[Tensor, tuple[float, float]]:
    """The mean and the standard deviation of the values that each parameter is initialised with.

    Weights and biases of linear layers and convolutions come from U(−1/√fan_in, 1/√fan_in), whose standard deviation
    is 1/√(3 fan_in); fan_in is that of torch, also for transposed convolutions. The same is taken for attention. Norm
    scales are 1 and shifts 0 without spread; so is, here, what multiplies nothing (class tokens, embeddings).

    >>> [(mean, round(std, 3)) for mean, std in initial_laws(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))).values()]
    [(0.0, 0.333), (0.0, 0.333), (1.0, 0.0), (0.0, 0.0)]
    """
    laws: dict[Tensor, tuple[float, float]] = {}
    for module in model.modules():
        own = {p: role_of(module, name, p) for name, p in module.named_parameters(recurse=False)}
        fans = [p[0].numel() for p, role in own.items() if isinstance(role, Multiplies)]
        for p, role in own.items():
            spreads = bool(fans) and (isinstance(role, Multiplies) or (isinstance(role, Adds) and p.ndim == 1))
            fan_in = p[0].numel() if isinstance(role, Multiplies) else fans[0] if fans else 0
            laws.setdefault(p, (float(isinstance(role, Scales)), 1 / math.sqrt(3 * fan_in) if spreads else 0.0))
    return laws
