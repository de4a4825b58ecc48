"""Modules whose derivatives are known to be right by every way that torch has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

PIECEWISE_LINEAR = (
    nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Identity, nn.Flatten, nn.Dropout
)
KNOWN = (
    *PIECEWISE_LINEAR, nn.Unflatten, nn.Tanh, nn.Sigmoid, nn.GELU, nn.ELU, nn.SiLU, nn.Softplus,
    nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d, nn.Dropout1d, nn.Dropout2d,
)  # fmt: skip


def is_plain(model: nn.Module, kinds: Sequence[type[nn.Module]] = KNOWN) -> bool:
    """Whether the model is made only of modules of these types and of `nn.Sequential`, as they come: none that is
    derived from them, carries forward hooks or has parameters computed from others.

    >>> is_plain(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
    True
    >>> is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    False
    """
    if is_altered(model):
        return False
    if type(model) is nn.Sequential:
        return all(is_plain(part, kinds) for part in model)
    return type(model) in kinds


def is_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models are one function, as far as it is known: the same plain modules (`is_plain`) with the same
    options and values.

    >>> linear = nn.Linear(2, 3)
    >>> is_same(linear, linear), is_same(linear, nn.Linear(2, 3))
    (True, False)
    """
    if not (is_plain(one) and is_plain(other)) or repr(one) != repr(other):
        return False
    pairs = zip(one.state_dict().values(), other.state_dict().values())
    return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs)


def is_altered(module: nn.Module) -> bool:
    """Whether a module computes something else than its type does, by hooks or by a forward method of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
