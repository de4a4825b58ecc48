"""Columns of the identity, a few at a time: how a structure reads entries out of an operator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 32


def identity_columns(size: int, like: Tensor) -> Iterator[tuple[int, Float[Tensor, "P k"]]]:
    """Pairs (start, E) where E holds the unit vectors start, ..., start + k - 1, of the type and device of `like`."""
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        columns = like.new_zeros(size, stop - start)
        columns[torch.arange(start, stop), torch.arange(stop - start)] = 1
        yield start, columns
