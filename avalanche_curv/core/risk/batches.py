"""Batches of examples: the same at every pass, of another size, and random subsets of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from avalanche_curv.core.nested import Nested, cat, examples, index, leaves, mapped, shapes, split

Batches = Iterable[tuple[Nested, Nested]]
"""(inputs, targets), which may be passed over again; inputs are any nesting of tensors (`nested`)."""


class CountedBatches(ABC):
    """Batches that know their number of examples without a pass over them."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """N."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        """(inputs, targets)."""


class View:
    """Other batches, each seen otherwise, with as many examples."""

    batches: Batches


def count(batches: Batches) -> int:
    """The number of examples: as `CountedBatches` say, or counted in one pass."""
    inner = batches
    while isinstance(inner, View):
        inner = inner.batches
    return inner.examples if isinstance(inner, CountedBatches) else sum(examples(targets) for _, targets in batches)


def kept(batches: Batches) -> Batches:
    """Batches that later changes of a list, a shuffling loader and random transforms leave as they are.

    A list or an iterator becomes a tuple. Of what has to be loaded at each pass, every pass is made from the same
    random states: see `SamePass`. A loader that begins otherwise all the same is held in memory as it comes once, such
    as those of accelerate and of Hugging Face's `Trainer`, which count the passes and shuffle by their number.
    """
    if isinstance(batches, SamePass):
        return batches
    loaded = not isinstance(batches, (tuple, list, Iterator))
    if loaded and SamePass(batches).repeats():
        return SamePass(batches)
    with untouched_randomness():
        return tuple(batches)


@dataclass(eq=False)
class SamePass(View):
    """A re-iterable view of batches whose every pass draws the same random numbers: the same shuffle, the same
    augmentation. Global random states and those of the loader are then as they were.

    Raises ValueError, in a later pass, for data that come otherwise all the same.
    """

    batches: Batches
    _states: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _seen: list[tuple[float, ...]] = field(default_factory=list, repr=False)

    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        generators = _generators(self.batches)
        for place, generator in enumerate(generators):
            self._states.setdefault(place, generator.get_state())
        randomness = _Randomness(generators, [self._states[place] for place in range(len(generators))])
        with randomness.in_use():
            iterator = iter(self.batches)
        number = 0
        while True:
            with randomness.in_use():
                batch: Any = next(iterator, None)
            if batch is None:
                break
            self._check(number, batch)
            number += 1
            yield batch
        if number < len(self._seen):
            raise self._differs(f"{number} batches instead of at least {len(self._seen)}")

    def repeats(self) -> bool:
        """Whether two passes begin alike: the second after the first whole one, unless they are known not to be
        counted."""
        try:
            for _ in islice(self, 1) if _is_plain(self.batches) else self:
                pass
            next(iter(self), None)
        except ValueError:
            return False
        return True

    def _check(self, number: int, batch: Any) -> None:
        print_ = tuple(map(_fingerprint, leaves(batch)))
        if number == len(self._seen):
            self._seen.append(print_)
        elif not np.array_equal(print_, self._seen[number], equal_nan=True):
            raise self._differs(f"batch {number} holds other values")

    def _differs(self, how: str) -> ValueError:
        return ValueError(
            f"The data are not the same at every pass: {how}. A result takes several passes over them. Give a loader "
            "that neither shuffles nor augments with randomness of its own, or a list of batches."
        )


class _Randomness:
    """The random states of one pass, apart from those of everybody else."""

    def __init__(self, generators: list[torch.Generator], states: list[Tensor]) -> None:
        self.generators = generators
        with _restored(generators):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002  the legacy state is the one that transforms use
            self._own = (*_states([])[:3], states)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with _restored(self.generators):
            _set_states(self.generators, self._own)
            yield
            self._own = _states(self.generators)


def _states(generators: list[torch.Generator]) -> tuple:
    legacy = np.random.get_state()  # noqa: NPY002
    return torch.default_generator.get_state(), random.getstate(), legacy, [g.get_state() for g in generators]


def _set_states(generators: list[torch.Generator], states: tuple) -> None:
    own, python, legacy, others = states
    torch.default_generator.set_state(own)
    random.setstate(python)
    np.random.set_state(legacy)  # noqa: NPY002
    for generator, state in zip(generators, others):
        generator.set_state(state)


@contextmanager
def _restored(generators: list[torch.Generator]) -> Iterator[None]:
    before = _states(generators)
    try:
        yield
    finally:
        _set_states(generators, before)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restores the random states of torch, numpy and Python afterwards, whatever a data set's transforms draw."""
    with _restored([]):
        yield


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators of its own that a `DataLoader` shuffles with."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    places = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(place, "generator", None) for place in places)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _is_plain(batches: Any) -> bool:
    """Whether no pass depends on those before but by random states: a `DataLoader` of torch over a data set with
    places, with torch's own samplers, or `CountedBatches`."""
    if not isinstance(batches, DataLoader):
        return isinstance(batches, CountedBatches)
    samplers = (batches.sampler, batches.batch_sampler, getattr(batches.batch_sampler, "sampler", None))
    own = all(type(part).__module__.startswith("torch.") for part in (batches, *samplers) if part is not None)
    return own and not isinstance(batches.dataset, IterableDataset)


def _fingerprint(part: Tensor) -> float:
    """A sum over all entries in which the place of an example counts."""
    if not part.numel():
        return 0.0
    rows = part.detach().reshape(len(part) if part.ndim else 1, -1).sum(1, dtype=torch.float64)
    return float(rows @ torch.linspace(1, 2, len(rows), dtype=rows.dtype, device=rows.device))


@dataclass(frozen=True)
class Rebatched:
    """A re-iterable view of batches with another batch size, without empty ones; the last batch may be smaller, and so
    may one before examples of another shape."""

    batches: Batches
    size: int

    def __iter__(self) -> Iterator[tuple[Nested, Nested]]:
        held: list[tuple[Nested, Nested]] = []
        count = 0
        for batch in self.batches:
            if not examples(batch[1]):
                continue
            if count and shapes(batch) != shapes(held[0]):
                yield cat(held)
                held, count = [], 0
            for part in split(tuple(batch), self.size):
                held.append(part)
                count += examples(part[1])
                if count >= self.size:
                    whole = cat(held)
                    yield index(whole, slice(self.size))
                    count -= self.size
                    held = [index(whole, slice(self.size, None))] if count else []
        if count:
            yield cat(held)


def merged(batches: Batches) -> tuple[tuple[Nested, Nested], ...]:
    """The examples in as few batches as their shapes allow, in order: sequences of another length do not fit in one."""
    runs = ([*run] for _, run in groupby(map(tuple, batches), key=shapes))
    return tuple(cat(run) if len(run) > 1 else run[0] for run in runs)


def random_part(examples: int, fraction: float, seed: int) -> Int[Tensor, "n"]:
    """Sorted indices of a random `fraction` of so many examples, at least one, without replacement.

    >>> len(random_part(50, 0.1, seed=0))
    5
    """
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(fraction * examples))].sort().values


def like(value: Nested, other: Tensor) -> Nested:
    """Tensors on the device of another; those of floating point numbers in its type, too. Of a tensor that was made in
    inference mode, with which nothing could be differentiated, a copy."""
    return mapped(lambda tensor: _like(tensor, other), value)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    own = tensor.clone() if tensor.is_inference() else tensor
    return own.to(other) if own.is_floating_point() else own.to(other.device)
