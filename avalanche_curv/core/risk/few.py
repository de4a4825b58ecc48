"""A few of the examples of a risk, on which is tried what is to hold for all of them."""

from __future__ import annotations

import torch

from avalanche_curv.core.nested import Nested, cat, examples, index, shapes
from avalanche_curv.core.risk.batches import Batches
from avalanche_curv.core.risk.preflight import check_batch

FEW = 4  # examples on which derivatives are tried


def few_of(batches: Batches) -> tuple[Nested, Nested]:
    """Some examples of one shape, up to four: of the whole of data in memory, else of the first batch. Raises
    ValueError where there is none, and for batches that are no pairs of tensors or nestings of these.

    >>> few_of(((torch.arange(6), torch.zeros(6)), (torch.arange(6, 8), torch.zeros(2))))[0]
    tensor([0, 2, 4, 6])
    """
    in_memory, first = isinstance(batches, tuple), None
    for batch in batches:
        check_batch(batch)
        first = batch if first is None and examples(batch[1]) else first
        if first is not None and not in_memory:
            break
    if first is None:
        raise ValueError("The risk of no examples is not defined: got no batch, or only empty ones. Give one or more.")
    found = [first]
    if in_memory:
        alike = [b for b in batches if examples(b[1]) and shapes(b) == shapes(first)]
        ends = torch.tensor([examples(y) for _, y in alike]).cumsum(0)
        count = min(FEW, int(ends[-1]))
        places = [i * int(ends[-1]) // count for i in range(count)]
        of_batch = torch.bucketize(torch.tensor(places), ends, right=True).tolist()
        starts = [0, *ends.tolist()]
        found = [index(tuple(alike[b]), slice(p - starts[b], p - starts[b] + 1)) for p, b in zip(places, of_batch)]
    return cat([index(tuple(part), slice(FEW)) for part in found])
