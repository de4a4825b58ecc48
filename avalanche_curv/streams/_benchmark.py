"""From tensors in memory to an Avalanche benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from avalanche.benchmarks import CLScenario, benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from jaxtyping import Float, Int
from torch import Tensor

from avalanche_curv.core.options import check_whole, is_count, optional

TEST_FRACTION = 0.2
CLASS_SETS = ("classes_in_this_experience", "previous_classes", "classes_seen_so_far", "future_classes")


class Labelled(Protocol):
    """A labelled data set: pairs (x, class) by index, and in `targets` the classes of all examples."""

    @property
    def targets(self) -> Int[Tensor, "N"] | Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class Examples:
    """Inputs and their classes, in memory.

    As a sequence it yields pairs (x, y) that are cut once, here: an example then costs Avalanche's loader about 40 % of
    what it costs with a `TensorDataset` behind `nc_benchmark`, which indexes two tensors for every example. A pickle
    holds the two tensors only, for each pair is a view and would carry the whole storage.

    >>> examples = Examples(torch.zeros(3, 2), torch.tensor([0, 1, 0]))
    >>> len(examples), examples[1]
    (3, (tensor([0., 0.]), 1))
    """

    def __init__(self, inputs: Float[Tensor, "N *features"], targets: Int[Tensor, "N"]) -> None:
        self.inputs = inputs
        self.targets = targets
        self._pairs: list[tuple[Tensor, int]] = list(zip(inputs.unbind(), targets.tolist()))

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pairs[index]

    def __reduce__(self) -> tuple[type[Examples], tuple[Tensor, Tensor]]:
        return Examples, (self.inputs, self.targets)

    def at(self, indices: Int[Tensor, "n"]) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples(self.inputs[indices], self.targets[indices])


def benchmark(splits: Iterable[tuple[Labelled, Labelled]], task_labels: Sequence[int], n_classes: int) -> CLScenario:
    """The benchmark whose experience t is the t-th (train, test) of `splits` and carries the t-th task label."""
    train, test = zip(*splits)
    return assembled(_datasets(train, task_labels), _datasets(test, task_labels), n_classes)


def assembled(train: Sequence[Any], test: Sequence[Any], n_classes: int) -> CLScenario:
    """The Avalanche benchmark with one experience for each data set in `train` and the one at its place in `test`.

    Experiences know their classes, as sorted lists: Avalanche's `with_classes_timeline` gives sets, which a masked
    multi-head cannot index with.
    """
    scenario = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=train, test=test)))
    scenario.n_classes = n_classes
    for stream in scenario.streams.values():
        stream.benchmark = scenario
        for experience in stream:
            for name in CLASS_SETS:
                setattr(experience, name, sorted(getattr(experience, name)))
    return scenario


def split_by_class(targets: Int[Tensor, "N"], rng: np.random.Generator) -> tuple[Int[Tensor, "a"], Int[Tensor, "b"]]:
    """Sorted indices (train, test): of each class, a random fifth (rounded) is for testing.

    >>> train, test = split_by_class(torch.tensor([0, 1] * 5), np.random.default_rng(0))
    >>> len(train), len(test), (test % 2).sort().values
    (8, 2, tensor([0, 1]))
    """
    testing = torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        members = torch.from_numpy(rng.permutation((targets == label).nonzero().squeeze(1).numpy()))
        testing[members[: round(TEST_FRACTION * len(members))]] = True
    return (~testing).nonzero().squeeze(1), testing.nonzero().squeeze(1)


def check_length(n_experiences: int) -> None:
    """Raises ValueError unless `n_experiences` is an integer of at least 1."""
    if not is_count(n_experiences):
        raise ValueError(f"A stream needs a whole n_experiences >= 1; got {n_experiences!r}. Ask for at least one.")


def check_stream_seed(seed: int | None) -> None:
    """Raises ValueError unless `seed` is an integer of at least 0, or None for another stream each time."""
    optional(check_whole)("seed", seed)


def _datasets(
    parts: Sequence[Labelled], task_labels: Sequence[int]
) -> list[TaskAwareSupervisedClassificationDataset]:
    return [_dataset(examples, label) for examples, label in zip(parts, task_labels)]


def _dataset(examples: Labelled, task_label: int) -> TaskAwareSupervisedClassificationDataset:
    labels = TaskLabels(ConstantSequence(task_label, len(examples)))
    return TaskAwareSupervisedClassificationDataset(
        [examples], data_attributes=[DataAttribute(examples.targets, "targets"), labels]
    )
