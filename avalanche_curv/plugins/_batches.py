"""The examples of an Avalanche data set as batches, loaded in order and without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from avalanche_curv.core.nested import Nested, examples, leaves
from avalanche_curv.core.risk.batches import CountedBatches, untouched_randomness
from avalanche_curv.core.risk.labelled import is_labelled
from avalanche_curv.core.risk.preflight import check_batch

IN_MEMORY_BYTES = 2**30  # data sets up to this size are loaded once, larger ones at every pass


@dataclass(frozen=True)
class LoadedBatches(CountedBatches):
    """(inputs, targets) of a data set, or mappings with `labels`, loaded anew at every pass and in the same order."""

    dataset: Any
    size: int

    @property
    def examples(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        for batch in loader(self.dataset, self.size):
            yield _without_attributes(self.dataset, batch) if isinstance(batch, Mapping) else (batch[0], batch[1])


def batches_of(dataset: Any, size: int) -> Any:
    """The data set in batches of `size`, held in memory where it fits. Raises ValueError for batches that are no
    pairs of tensors or nestings of these."""
    batches = LoadedBatches(dataset, size)
    first = next(iter(batches))
    if not is_labelled(first):
        check_batch(first)
    fits = sum(part.nbytes for part in leaves(first)) / examples(first) * len(dataset) <= IN_MEMORY_BYTES
    return tuple(batches) if fits else batches


def collected(dataset: Any, indices: list[int]) -> tuple[Nested, Tensor, Tensor]:
    """The examples at `indices` as one batch (inputs, targets, task labels); label 0 where the data carry none."""
    part = dataset.subset(indices)
    with untouched_randomness():
        batch = next(iter(loader(part, len(indices))))
    return parts_of(part, batch)


def parts_of(dataset: Any, batch: Any) -> tuple[Nested, Tensor, Tensor]:
    """(inputs, targets, task labels) of a batch of a data set; of a mapping, the rest, `labels` and 0."""
    if is_labelled(batch):
        rest = _without_attributes(dataset, batch)
        targets = rest.pop("labels")
        return rest, targets, torch.zeros(len(targets), dtype=torch.long)
    tasks = batch[-1] if len(batch) > 2 else torch.zeros(examples(batch[1]), dtype=torch.long)
    return batch[0], batch[1], tasks


def _without_attributes(dataset: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what Avalanche adds to each example, such as task labels, which the model does not take."""
    added = {*getattr(dataset, "_data_attributes", ())} - {"labels"}
    return {name: part for name, part in batch.items() if name not in added}


def loader(dataset: Any, batch_size: int) -> DataLoader:
    """Batches in order; a generator of its own keeps the global random state as it is."""
    collate = getattr(dataset, "collate_fn", None)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())
