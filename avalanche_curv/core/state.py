"""Values as tensors, numbers, strings, tuples and dictionaries alone: what `torch.load(path, weights_only=True)` reads
without executing a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="Saved")

State = dict[str, Any]
"""{"type": a name, "fields": what it holds by name}."""


class Storable:
    """A value that a state holds by the name of its type and by its fields: a frozen dataclass, unless it says
    otherwise in `stored_fields`. Subclasses are read back as soon as they are defined."""

    def stored_fields(self) -> dict[str, Any]:
        """The arguments of the constructor that make this value again. Raises TypeError where there are none."""
        if not is_dataclass(self):
            raise TypeError(_unwritable(self))
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Saved(Storable):
    """A frozen value with a state of its own."""

    def state_dict(self) -> State:
        """This value as tensors, numbers, strings, tuples and dictionaries, copied, for `torch.save`. Raises TypeError
        for what is not made of these."""
        return written(self)

    @classmethod
    def load_state_dict(cls: type[S], state: State) -> S:
        """The value of which `state_dict` made `state`, equal to the bit. Nothing is changed: it is returned.

        Raises ValueError for any other state, with what came, and for a type that is not known: a structure, policy or
        grouping of one's own is to be imported before.
        """
        return cls.checked(read(check_state(state, cls)), state)

    @classmethod
    def checked(cls: type[S], value: Any, state: State) -> S:
        """`value`, which was read from `state`. Raises ValueError where it is none of this type."""
        if not isinstance(value, cls):
            raise ValueError(not_state_of(cls.__name__, state))
        return value


def written(value: Any) -> Any:
    """A value as `torch.load(path, weights_only=True)` reads it. Raises TypeError for what has no such form."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, bool | int | float | str | torch.Size):
        return value
    if isinstance(value, tuple):
        return tuple(map(written, value))
    if isinstance(value, list):
        return [*map(written, value)]
    if isinstance(value, Mapping):
        return {"type": "dict", "fields": {name: written(part) for name, part in value.items()}}
    if isinstance(value, Storable):
        return state_of(type(value).__name__, **{name: written(part) for name, part in value.stored_fields().items()})
    raise TypeError(_unwritable(value))


def state_of(kind: str, **parts: Any) -> State:
    """The state of an object of this type, from parts that are written already."""
    return {"type": kind, "fields": parts}


def check_state(state: Any, kind: type | str, *names: str) -> State:
    """`state`. Raises ValueError unless it is that of an object of this type, or of a subclass of it, with fields of
    these names."""
    name = kind if isinstance(kind, str) else kind.__name__
    whole = isinstance(state, Mapping) and isinstance(state.get("fields"), Mapping)
    if not whole or (isinstance(kind, str) and state["type"] != kind):
        raise ValueError(not_state_of(name, state))
    if missing := [one for one in names if one not in state["fields"]]:
        raise ValueError(f"{not_state_of(name, state)[:-1]} without {' and '.join(missing)}, of other options.")
    return dict(state)


def read(value: Any, known: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The value of which `written` made this; `known` are further types by name. Raises ValueError for a type that is
    not known, and for fields that do not make it."""
    return _read(value, {"dict": dict, **_subclasses(Storable), **(known or {})})


def _read(value: Any, known: Mapping[str, Callable[..., Any]]) -> Any:
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(_read(part, known) for part in value)
    if isinstance(value, list):
        return [_read(part, known) for part in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") not in known:
        raise ValueError(f"{value.get('type')} is not known here. Import the module that defines it before.")
    parts = {name: _read(part, known) for name, part in value["fields"].items()}
    try:
        return known[value["type"]](**parts)
    except TypeError as error:
        raise ValueError(f"{value['type']} is not made of {', '.join(parts)} here: {error}") from error


def _subclasses(kind: type) -> dict[str, Callable[..., Any]]:
    """Every class that derives from this one, by name."""
    found = [kind]
    for one in found:
        found += one.__subclasses__()
    return {one.__name__: one for one in found}


def _unwritable(value: Any) -> str:
    kind = f"The type {value.__name__}" if isinstance(value, type) else type(value).__name__
    return (
        f"{kind} is no tensor, number or string, nor made of them. Use save_checkpoint, or pickle what "
        "holds it, and load only files that you trust."
    )


def not_state_of(name: str, state: Any) -> str:
    """What is wrong with a state that is none of an object of this name."""
    if isinstance(state, Mapping):
        kind = state.get("type", state.get("mitigator"))
        got = f"that of {kind}" if kind else f"a dictionary of {', '.join(map(repr, [*state][:4])) or 'nothing'}"
    else:
        got = type(state).__name__
    return f"{name}.load_state_dict() takes what its state_dict() returned; got {got}."
