"""The experiences that a comparison trains and tests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from avalanche.benchmarks.scenarios.dataset_scenario import split_validation_class_balanced

from avalanche_curv.streams._benchmark import assembled
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.experiments.compare import Setting


@dataclass(frozen=True)
class Data:
    """An Avalanche benchmark, and the number of training examples of the whole stream, of which it may be the start."""

    benchmark: Any
    examples: int


def data_for(setting: Setting, seed: int, dataset_root: Path | None) -> Data:
    """The first experiences of the stream; in tuning their test stream is what was held out of training, the same part
    of each class."""
    found = STREAMS[setting.stream].make(seed, dataset_root, setting.scenario)
    examples = sum(len(experience.dataset) for experience in found.train_stream)
    train, test = (_datasets(stream, setting.experiences) for stream in (found.train_stream, found.test_stream))
    if setting.validation:
        torch.manual_seed(seed)
        pairs = [split_validation_class_balanced(setting.validation, dataset) for dataset in train]
        train, test = (list(part) for part in zip(*pairs))
    if setting.test_limit is not None:
        test = [_at_most(setting.test_limit, dataset) for dataset in test]
    return Data(assembled(train, test, classes(train)), round(examples * (1 - setting.validation)))


def classes(datasets: Sequence[Any]) -> int:
    """How many outputs they speak of."""
    return 1 + max(int(torch.as_tensor(list(dataset.targets)).max()) for dataset in datasets)


def _datasets(stream: Any, count: int) -> list[Any]:
    return [experience.dataset for experience in list(stream)[:count]]


def _at_most(limit: int, dataset: Any) -> Any:
    """The first of a fixed shuffle."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return dataset.subset(order[:limit].tolist())
