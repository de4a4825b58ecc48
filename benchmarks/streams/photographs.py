"""Streams of photographs: Avalanche's, which read, crop and flip an image when it is asked for."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.streams.mnist import split_options
from benchmarks.streams.scenario import CLASS

CORE50_ORDERS = 10  # that Avalanche has


def split_cifar10(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche.benchmarks.classic import SplitCIFAR10

    return _first(SplitCIFAR10(5, seed=seed, dataset_root=root, **split_options(scenario)), experiences)


def split_cifar100(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche.benchmarks.classic import SplitCIFAR100

    return _first(SplitCIFAR100(10, seed=seed, dataset_root=root, **split_options(scenario)), experiences)


def split_tiny_imagenet(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche.benchmarks.classic import SplitTinyImageNet

    return _first(SplitTinyImageNet(10, seed=seed, dataset_root=root, **split_options(scenario)), experiences)


def core50(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    """New classes in each of 9 experiences, or new sessions in each of 8 (Lomonaco & Maltoni 2017), in the order
    `seed` mod 10 of the ten that there are.

    Avalanche has one test set for all experiences. Here the test set of an experience is all of it where the classes
    are the same throughout, and otherwise what it has of its classes.
    """
    from avalanche.benchmarks.classic import CORe50

    from avalanche_curv.streams._benchmark import assembled

    name = "nc" if scenario == CLASS else "ni"
    found = CORe50(scenario=name, run=seed % CORE50_ORDERS, dataset_root=None if root is None else root / "core50")
    train = [experience.dataset for experience in islice(found.train_stream, experiences)]
    everything = found.test_stream[0].dataset
    return assembled(train, [_of_classes(everything, set(part.targets)) for part in train], found.n_classes)


def _of_classes(dataset: Any, classes: set[int]) -> Any:
    return dataset.subset([index for index, target in enumerate(dataset.targets) if target in classes])


def _first(found: Any, experiences: int) -> Any:
    from avalanche_curv.streams._benchmark import assembled

    train, test = (
        [experience.dataset for experience in islice(stream, experiences)]
        for stream in (found.train_stream, found.test_stream)
    )
    return assembled(train, test, found.n_classes)
