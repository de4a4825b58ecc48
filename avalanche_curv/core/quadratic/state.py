"""What is known of the past as tensors, numbers and strings alone, to be saved and loaded without executing a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.policies import Past, RefreshEvent
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import frozen_copy
from avalanche_curv.core.risk.losses import example_loss
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.selection import Selection
from avalanche_curv.core.structures.base import Matrix
from avalanche_curv.core.structures.block_diagonal import Block, Grouping
from avalanche_curv.core.structures.kronecker_matrix import FactoredLayer, KroneckerSum, KroneckerTerm

VALUES = (ParameterSpace, QuadraticModel, RefreshEvent, Selection, Block, FactoredLayer)  # that a past holds
KINDS = (Past, Matrix, Grouping, KroneckerTerm, KroneckerSum)  # whose subclasses it holds, those of users among them


def past_state(past: Past) -> dict[str, Any]:
    """`past` as a dictionary of tensors, numbers, strings, tuples and dictionaries, for `torch.save`:

        torch.save(past_state(plugin.past), path)
        plugin.past = past_from_state(torch.load(path, weights_only=True))

    A dataclass becomes {"type": its name, "fields": by name}. Stored examples are written as tensors, and the model at
    which they are frozen as its `state_dict`. Raises TypeError for what is none of these: `MatrixFree`, which keeps a
    model instead of a matrix, examples of one task of a multi-task model, and parameters that are selected by type of
    module; use `save_checkpoint` for these.
    """
    state = {"past": _written(past)}
    if past.stored:
        base = past.stored[0].base
        if any(risk.base is not base for risk in past.stored):
            raise TypeError("The stored examples are frozen at different models. Use save_checkpoint, or pickle.")
        state["frozen"] = {name: value.detach().clone() for name, value in base.state_dict().items()}
        state["trained"] = tuple(name for name, parameter in base.named_parameters() if parameter.requires_grad)
    return state


def past_from_state(state: dict[str, Any], *, model: nn.Module | None = None, criterion: object = None) -> Past:
    """The past of which `past_state` made `state`, with the same penalty to the bit.

    Where it holds stored examples, `criterion` is their loss, and `model` one of the same parameters, whose values do
    not matter and which stays as it is. Raises ValueError where these are needed and missing, or where `state` names a
    type that is not known: a structure, policy or grouping of one's own is to be imported before.
    """
    known: dict[str, Callable[..., Any]] = {cls.__name__: cls for cls in (*VALUES, *_subclasses(KINDS))}
    if "frozen" in state:
        if model is None or criterion is None:
            raise ValueError("This past holds stored examples: give the `model` and `criterion` that they belong to.")
        base, loss = frozen_copy(model), example_loss(criterion)
        base.load_state_dict(state["frozen"])
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in state["trained"])
        known["EmpiricalRisk"] = partial(EmpiricalRisk, base, loss, verdicts={})
    return _read(state["past"], known)


def _written(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, bool | int | float | str | torch.Size):
        return value
    if isinstance(value, tuple):
        return tuple(map(_written, value))
    if isinstance(value, EmpiricalRisk) and value.adapter is None:
        parts = {"batches": tuple(map(tuple, value.batches)), "selection": value.selection}
        return {"type": "EmpiricalRisk", "fields": {name: _written(part) for name, part in parts.items()}}
    if isinstance(value, (*VALUES, *KINDS)) and is_dataclass(value):
        found = {field.name: _written(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, "fields": found}
    raise TypeError(
        f"{type(value).__name__} is no tensor, number or string, nor made of them. Use save_checkpoint, or pickle the "
        "past, and load only files that you trust."
    )


def _read(value: Any, known: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(value, dict):
        if value["type"] not in known:
            raise ValueError(f"{value['type']} is not known here. Import the module that defines it before.")
        return known[value["type"]](**{name: _read(part, known) for name, part in value["fields"].items()})
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(_read(part, known) for part in value)
    return value


def _subclasses(kinds: Iterable[type]) -> list[type]:
    """The kinds, and every class that derives from one of them."""
    found = [*kinds]
    for kind in found:
        found += kind.__subclasses__()
    return found
