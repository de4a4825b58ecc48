"""Streams that keep changing, over any classification data set: to see whether a network stays able to learn."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLScenario
from avalanche.benchmarks.utils import AvalancheDataset
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from avalanche_curv.core.hints import called
from avalanche_curv.streams._benchmark import Examples, benchmark, check_length, check_stream_seed
from avalanche_curv.streams.changes import PixelOrder, TaskChange, TaskVariant


def NonStationary(
    train: Any, change: TaskChange, *, n_experiences: int, test: Any | None = None, seed: int | None = None
) -> CLScenario:
    """One data set, changed anew in each experience: `RandomLabels()`, `ShuffledLabels()`, `PixelPermutation()`,
    `LabelFlip()` or `GrowingClasses()`.

    `train` and `test` yield pairs (x, class) and know their classes: data sets with `.targets` (torchvision's,
    Avalanche's), a `TensorDataset` of inputs and classes, or a `Subset` of these. The test experience t is `test` under
    the same change as the training experience t. Without `test` it is the training examples themselves; so it always is
    for random and shuffled labels, which say nothing of other images. Task labels are 0 throughout.

    Images are read from `train` and `test` when they are asked for; an experience holds classes alone, and the places
    of growing ones, in the smallest integers that hold them. All of them are drawn here, since Avalanche looks through
    them for the classes of each experience: for 100,000 examples 0.1 s a task, and 0.1 MB each to train and to test on
    (twice that beyond 128 classes). Classes are those of `.targets`: a data set's `target_transform` does not change
    them. With one seed, a longer stream begins with the shorter one; `seed=None` draws from the system's entropy;
    global random states are not used.

    Raises TypeError for a data set whose classes cannot be known without reading every example; ValueError for
    n_experiences < 1 or beyond what `GrowingClasses` has, a negative seed, and for test examples of labels that can
    only be memorised.

    >>> from avalanche_curv.streams import LabelFlip
    >>> digits = TensorDataset(torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    >>> stream = NonStationary(digits, LabelFlip(), n_experiences=3, seed=0)
    >>> [[example[1] for example in experience.dataset] for experience in stream.train_stream[:2]]
    [[0, 1, 2, 0, 1, 2], [2, 0, 1, 2, 0, 1]]
    """
    check_length(n_experiences)
    _check_change(change, test)
    check_stream_seed(seed)
    inputs, targets = _parts(train, training=True)
    classes = targets.unique()
    _check_end(change, classes, n_experiences)
    same = test is None and isinstance(inputs, Rows)  # in which no transform tells training from testing
    test_inputs, test_targets = (
        (inputs, targets) if same else _parts(train if test is None else test, training=False)
    )
    _check_classes(classes, test_targets)
    seed = int(np.random.default_rng().integers(2**63)) if seed is None else int(seed)
    splits = [
        (
            Changed(inputs, change.of(targets, classes, task, seed)),
            Changed(test_inputs, change.of(test_targets, classes, task, seed)),
        )
        for task in range(n_experiences)
    ]
    return benchmark(splits, [0] * n_experiences, len(classes))


class Changed:
    """The examples (x, class) of one task: the inputs are shared by all tasks and read when asked for."""

    def __init__(self, inputs: Inputs, variant: TaskVariant) -> None:
        self.inputs = inputs
        self.targets = _compact(variant.targets)
        self._places: Sequence[int] = range(len(inputs)) if variant.indices is None else _compact(variant.indices)
        self._pixels: PixelOrder | None = variant.pixels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        x = self.inputs[self._places[index]]
        return (x if self._pixels is None else self._pixels.of(x)), self.targets[index]


class Rows:
    """The rows of a tensor, cut once; a pickle holds the tensor only."""

    def __init__(self, tensor: Shaped[Tensor, "N *features"]) -> None:
        self.tensor = tensor
        self._rows = tensor.unbind()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]

    def __reduce__(self) -> tuple[type[Rows], tuple[Tensor]]:
        return Rows, (self.tensor,)


class Firsts:
    """The inputs of a data set: the first of what each of its examples holds."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index][0]


Inputs = Rows | Firsts


def _compact(numbers: Int[Tensor, "n"]) -> array[int]:
    """`numbers` as an array of the smallest integers that hold them all; as quick to read as a list.

    >>> _compact(torch.tensor([-1, 127])), _compact(torch.tensor([128])).itemsize
    (array('b', [-1, 127]), 2)
    """
    kinds = [code for code in "bhi" if len(numbers) and _fits(numbers, code)]
    code = kinds[0] if kinds else "q"
    return array(code, numbers.numpy().astype(code).tobytes())


def _fits(numbers: Int[Tensor, "n"], code: str) -> bool:
    limits = np.iinfo(code)
    return int(limits.min) <= int(numbers.min()) and int(numbers.max()) <= int(limits.max)


def _parts(dataset: Any, *, training: bool) -> tuple[Inputs, Int[Tensor, "N"]]:
    """Inputs and classes of a data set, the latter without reading an example."""
    if isinstance(dataset, Examples):
        return Rows(dataset.inputs), _classes(dataset.targets)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return Rows(dataset.tensors[0]), _classes(dataset.tensors[1])
    if isinstance(dataset, AvalancheDataset):
        dataset = dataset.train() if training else dataset.eval()
    return Firsts(dataset), _classes(_targets(dataset))


def _targets(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        return _parts(dataset.dataset, training=True)[1][torch.as_tensor(dataset.indices)]
    if getattr(dataset, "targets", None) is None:
        raise TypeError(
            f"NonStationary needs to know the class of every example; {type(dataset).__name__} has no targets. Set "
            "dataset.targets to a list of its classes (dataset.labels of torchvision's SVHN)."
        )
    return dataset.targets


def _classes(targets: Any) -> Int[Tensor, "N"]:
    known = targets if isinstance(targets, Tensor) else torch.tensor(np.asarray(list(targets)))
    if known.dim() != 1 or known.is_floating_point() or known.is_complex() or not len(known):
        raise TypeError(
            f"NonStationary needs one whole number for each example, and one example at least; got targets of shape "
            f"{tuple(known.shape)} and type {known.dtype}. Give class indices."
        )
    return known.long()


def _check_change(change: Any, test: Any) -> None:
    if not isinstance(change, TaskChange):
        hint = f"Did you mean {called(change)}?" if isinstance(change, type) else "Give RandomLabels(), say."
        raise TypeError(f"NonStationary needs a change; got {change!r}. {hint}")
    if change.memorised and test is not None:
        raise ValueError(
            f"{type(change).__name__} gives labels that say nothing of other images, so there is nothing to test on "
            "them. Leave test out: the test experiences are then the training examples, to see what is memorised."
        )


def _check_end(change: TaskChange, classes: Int[Tensor, "K"], n_experiences: int) -> None:
    longest = change.longest(classes)
    if longest is not None and n_experiences > longest:
        raise ValueError(
            f"{change} has shown all {len(classes)} classes after {longest} experiences; got n_experiences = "
            f"{n_experiences}. Ask for at most {longest}."
        )


def _check_classes(classes: Int[Tensor, "K"], test_targets: Int[Tensor, "M"]) -> None:
    unknown = sorted(set(test_targets.tolist()) - set(classes.tolist()))
    if unknown:
        raise ValueError(f"The test examples have classes {unknown} that no training example has. Leave these out.")
