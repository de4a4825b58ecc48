"""Batches of examples: of another size, without a change of the random state, and random subsets of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Batches = Iterable[tuple[Tensor, Tensor]]
"""(inputs, targets), which may be passed over again."""


@dataclass(frozen=True)
class Rebatched:
    """A re-iterable view of batches with another batch size; the last batch may be smaller."""

    batches: Batches
    size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        count = 0
        for x, y in self.batches:
            if count and x.shape[1:] != inputs[0].shape[1:]:  # sequences of another length do not fit in one batch
                yield torch.cat(inputs), torch.cat(targets)
                inputs, targets, count = [], [], 0
            for part_x, part_y in zip(x.split(self.size), y.split(self.size)):
                inputs.append(part_x)
                targets.append(part_y)
                count += len(part_y)
                if count >= self.size:
                    all_x, all_y = torch.cat(inputs), torch.cat(targets)
                    yield all_x[: self.size], all_y[: self.size]
                    inputs, targets = [all_x[self.size :]], [all_y[self.size :]]
                    count -= self.size
        if count:
            yield torch.cat(inputs), torch.cat(targets)


def without_drawing(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates over the batches, restoring torch's global random state after whatever the loader draws from it."""
    with torch.random.fork_rng(devices=[]):
        iterator = iter(batches)
    while True:
        with torch.random.fork_rng(devices=[]):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def random_part(examples: int, fraction: float, seed: int) -> Int[Tensor, "n"]:
    """Sorted indices of a random `fraction` of so many examples, at least one, without replacement.

    >>> len(random_part(50, 0.1, seed=0))
    5
    """
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return order[: max(1, round(fraction * examples))].sort().values


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor on the device of another and, if it holds floating point numbers, in its type; a copy of one that was
    made in inference mode, with which nothing could be differentiated."""
    own = tensor.clone() if tensor.is_inference() else tensor
    return own.to(other) if own.is_floating_point() else own.to(other.device)
