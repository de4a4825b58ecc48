"""How many bytes a method keeps between experiences beside the model: tensors and examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from torch import nn

IGNORED = (EvaluationPlugin, Clock, torch.optim.Optimizer, str, bytes, type)
OWN = ("dataset", "storage_policy")  # what Cumulative and DER hold themselves


def stored_bytes(strategy: Any) -> int:
    """The tensors and stored examples that a strategy and its plugins hold; each storage once. Joint training holds the
    examples of all experiences."""
    roots = [*strategy.plugins, *(getattr(strategy, name, None) for name in OWN)]
    roots += [experience.dataset for experience in getattr(strategy, "_experiences", ())]
    held = dict(_reachable(roots, set()))
    own = {p.untyped_storage().data_ptr() for p in (*strategy.model.parameters(), *strategy.model.buffers())}
    return sum(size for place, size in held.items() if place not in own)


def _reachable(value: Any, seen: set[int]) -> Iterator[tuple[int, int]]:
    """Pairs (place, bytes) of what can be reached from a value."""
    if value is None or isinstance(value, IGNORED) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    elif isinstance(value, AvalancheDataset):
        if len(value):
            yield id(value), len(value) * sum(part.nbytes for part in value[0] if isinstance(part, torch.Tensor))
    else:
        for part in _parts(value):
            yield from _reachable(part, seen)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    known = is_dataclass(value) or isinstance(value, nn.Module)
    if known or type(value).__module__.startswith(("avalanche", "benchmarks.")):
        return list(getattr(value, "__dict__", {}).values())
    return []
