"""Nestings of tensors: what a model takes for its inputs and a criterion for its targets, with one example on the first
axis of each tensor.

A nesting is a tensor, a tuple, list or mapping of nestings, such as the `BatchEncoding` of a tokenizer, or None where
an optional input is not given. Every function keeps the kinds of the containers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Nested: TypeAlias = Any
"""Tensor | tuple[Nested, ...] | list[Nested] | Mapping[str, Nested] | None"""


def mapped(function: Callable[[Tensor], Tensor], value: Nested) -> Nested:
    """The nesting of what `function` makes of each tensor.

    >>> mapped(torch.neg, {"a": torch.tensor([1]), "b": (torch.tensor([2]), None)})
    {'a': tensor([-1]), 'b': (tensor([-2]), None)}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _filled(value, {key: mapped(function, part) for key, part in value.items()})
    if isinstance(value, (tuple, list)):
        parts = [mapped(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def leaves(value: Nested) -> list[Tensor]:
    """Its tensors, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in leaves(part)]


def rebuilt(like: Nested, tensors: Iterable[Tensor]) -> Nested:
    """A nesting like another, of other tensors in the order of `leaves`."""
    one = iter(tensors)
    return mapped(lambda _: next(one), like)


def examples(value: Nested) -> int:
    """How many examples it holds, as its first tensor says."""
    return len(leaves(value)[0])


def split(value: Nested, size: int) -> list[Nested]:
    """Consecutive pieces of `size` examples; the last may be smaller.

    >>> split((torch.arange(3), [torch.arange(3)]), 2)
    [(tensor([0, 1]), [tensor([0, 1])]), (tensor([2]), [tensor([2])])]
    """
    if isinstance(value, Tensor):
        return list(value.split(size))
    return [rebuilt(value, parts) for parts in zip(*(tensor.split(size) for tensor in leaves(value)))]


def cat(values: Sequence[Nested]) -> Nested:
    """The examples of all nestings, in order, in a nesting like the first."""
    return rebuilt(values[0], map(torch.cat, zip(*map(leaves, values))))


def index(value: Nested, places: slice | Tensor | None) -> Nested:
    """The examples at these places; for None, the value as the one example of a batch."""
    if not isinstance(places, Tensor):
        return mapped(lambda tensor: tensor[places], value)
    return mapped(lambda tensor: tensor.index_select(0, places.to(tensor.device)), value)  # a fifth of tensor[places]


def repeated(value: Nested, times: int) -> Nested:
    """A single example so many times, without memory for it."""
    return mapped(lambda tensor: tensor.expand(times, *tensor.shape[1:]), value)


def shapes(value: Nested) -> Hashable:
    """The shapes of one example, equal for nestings whose examples fit in one batch."""
    if isinstance(value, Tensor):
        return value.shape[1:]
    if isinstance(value, Mapping):
        return tuple((key, shapes(part)) for key, part in value.items())
    return tuple(map(shapes, value)) if isinstance(value, (tuple, list)) else value


def are_classes(targets: Nested) -> bool:
    """Whether targets are classes, one integer for each example, so that there is an accuracy."""
    return isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()


def described(value: Nested) -> str:
    """The types and shapes of its tensors, in words.

    >>> described({"ids": torch.zeros(2, 3, dtype=torch.long), "mask": None})
    "{'ids': int64 (2, 3), 'mask': None}"
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(part)}' for key, part in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(described, value))})"
    return "None" if value is None else type(value).__name__


def _filled(like: Mapping, items: dict[Any, Nested]) -> Mapping:
    """A mapping of the kind of another, with other values; a dict where that kind cannot be changed."""
    if type(like) is dict:
        return items
    made: Any = copy.copy(like)
    try:
        for key, part in items.items():
            made[key] = part
    except TypeError:
        return items
    return made
