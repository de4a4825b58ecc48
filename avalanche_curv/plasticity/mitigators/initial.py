"""Initial parameters: their values when first seen, and the distributions that torch draws them from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from avalanche_curv.plasticity.mitigators.roles import NORMS, RECURRENT, Adds, Multiplies, Scales, role_of


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
    """The mean and the standard deviation of the values that torch initialises each parameter with.

    Weights and biases of linear and bilinear layers and convolutions come from U(−b, b) with b = 1/√fan_in, those of
    recurrent layers with b = 1/√hidden; the standard deviation is b/√3. fan_in is that of torch, also for transposed
    convolutions. `MultiheadAttention` draws the weights that enter it from Xavier's distribution, with
    √(2 / (fan_in + fan_out)), the one that leaves it as a linear layer's, and has biases of 0, but for the key and the
    value that it appends (`bias_k`, `bias_v`), which have 1/√fan_in. Matrices in other modules, and the biases beside
    them, are taken as those of a linear layer. Norm scales are 1 and shifts 0 without spread; so is, here, what
    multiplies nothing (class tokens, embeddings).

    Without a law are other parameters that have no role: slopes of PReLU, single numbers, vectors that nothing tells
    about, and what a weight is computed from.

    >>> [(mean, round(std, 3)) for mean, std in initial_laws(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))).values()]
    [(0.0, 0.333), (0.0, 0.333), (1.0, 0.0), (0.0, 0.0)]
    """
    laws: dict[Tensor, tuple[float, float]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = role_of(module, name, parameter)
            if role is not None:
                laws.setdefault(parameter, (float(isinstance(role, Scales)), _spread(module, name, parameter)))
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                laws.setdefault(parameter, (0.0, 0.0))
    return laws


def _spread(module: nn.Module, name: str, parameter: nn.Parameter) -> float:
    """The standard deviation that a parameter with a role begins with."""
    if isinstance(module, nn.MultiheadAttention):
        if name == "in_proj_bias":
            return 0.0
        ends = (parameter.shape[-1],) * 2 if name.startswith("bias") else parameter.shape
        return math.sqrt(2 / sum(ends)) if sum(ends) else 0.0
    if isinstance(module, NORMS) or (isinstance(module, NonDynamicallyQuantizableLinear) and name == "bias"):
        return 0.0  # that linear layer is the one by which attention leaves
    if isinstance(module, RECURRENT):
        fan_in = module.hidden_size
    elif isinstance(module, nn.Bilinear):
        fan_in = module.in1_features
    else:
        fan_in = _fan_in(module, parameter)
    return 1 / math.sqrt(3 * fan_in) if fan_in else 0.0


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    """Entries that make one output: of the parameter itself, or of the first matrix beside a vector that is added."""
    own = {p: role_of(module, n, p) for n, p in module.named_parameters(recurse=False)}
    if isinstance(own[parameter], Adds):
        matrices = [p for p, role in own.items() if isinstance(role, Multiplies)]
        return math.prod(matrices[0].shape[1:]) if matrices and parameter.ndim == 1 else 0
    return math.prod(parameter.shape[1:])
