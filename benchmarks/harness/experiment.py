"""Experiments: an explicit grid of configurations, each run with each seed. Their units of work, and the digest by
which a finished unit is recognised."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from benchmarks.harness.options import Options

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

Record = Mapping[str, Any]
"""``{"metric": str, "value": float, "step": int | None}``, and any further JSON values; without "step" it is None."""


def is_timing(metric: str) -> bool:
    """Whether the name of a metric says that it is a time on the clock; all other records are the same whenever a unit
    runs again with its seed. An experiment marks what is a time under another name itself: ``{..., "timing": True}``.

    >>> [is_timing(name) for name in ("seconds", "metric_seconds", "step/naive/milliseconds", "time/epoch", "lifetime")]
    [True, True, True, True, False]
    """
    last = metric.rpartition("/")[2]
    return metric.startswith("time/") or last.rpartition("_")[2] in ("seconds", "milliseconds")


class Config(Protocol):
    """One cell of the grid: a frozen dataclass of plain values and of further dataclasses, picklable.

    Its label is unique in the grid, and for display: the row of the tables and the run of TensorBoard. All other fields
    are columns of the results (`columns`), by which reports select. A class may add a property ``cost`` (default 1.0,
    any unit): among the runs of one seed the costly ones start first, so that the tail is short.
    """

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Context:
    """The inputs of a run beside its configuration.

    Everything that changes the numbers belongs in the configuration instead, because a finished run is recognised by
    configuration, seed and `quick` alone.
    """

    seed: int
    quick: bool
    dataset_root: Path | None
    tensorboard_dir: Path
    """The folder of `TensorboardLogger`; files of an interrupted run have been removed."""


class Experiment(ABC):
    """A named question to answer with numbers. The object is pickled for worker processes, so define its class at the
    top of a module."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increase it when the same configuration gives other numbers than before: finished runs then count no more."""
    options_type: ClassVar[type[Options]] = Options
    jobs: ClassVar[int | None] = None
    """How many units run side by side unless the command says; None for one a CPU. 1 where they measure times."""
    shown: ClassVar[tuple[str, ...]] = ()
    """The labels that matter most, where there is no room for all (`board.selected`); none for the first ones."""

    def variant(self, options: Any) -> str:
        """A suffix of the results folder, for options that ask a different question (such as the stream)."""
        return ""

    def folder(self, options: Options) -> str:
        """The name of the results folder. A quick run has its own, so that it never replaces what a full one left."""
        return "-".join(part for part in (self.name, self.variant(options), "quick" if options.quick else "") if part)

    def check(self, options: Any) -> None:
        """Raise `UsageError` for options that cannot be met. It is called before anything else, torch included, is
        loaded: define it where the module of the experiment imports neither torch nor Avalanche."""
        return None

    def prerequisite(self, options: Any) -> tuple[Experiment, Options] | None:
        """An experiment to run first, in a folder of its own beside this one's, such as the tuning of the methods that
        this one reports on."""
        return None

    def settled(self, options: Any, results: Results) -> Any:
        """The options, changed by the results of the prerequisite."""
        return options

    @abstractmethod
    def configs(self, options: Any) -> Sequence[Config]:
        """The grid, in the order of the tables; with `options.quick` a grid of seconds. Raise `UsageError` here for
        options that cannot be met, such as a data set that is absent."""

    @abstractmethod
    def run(self, config: Any, seed: int, context: Context) -> Iterable[Record]:
        """The records of one run. The random states of random, numpy and torch have just been seeded with `seed`."""


@dataclass(frozen=True)
class Unit:
    """One configuration with one seed."""

    experiment: str
    version: int
    config: Config
    seed: int
    quick: bool

    @cached_property
    def digest(self) -> str:
        return digest([self.experiment, self.version, self.config, self.seed, self.quick])

    @property
    def label(self) -> str:
        return self.config.label

    @property
    def cost(self) -> float:
        return float(getattr(self.config, "cost", 1.0))


def grid(experiment: Experiment, options: Options) -> list[Unit]:
    """All units of an experiment, in the order of its configurations. Raises ValueError or TypeError for an empty grid,
    for configurations that are no frozen dataclasses, and for labels or configurations that are equal."""
    configs = list(experiment.configs(options))
    if not configs:
        raise ValueError("The grid is empty. Return at least one configuration from `configs`.")
    for config in configs:
        if not is_dataclass(config) or not type(config).__dataclass_params__.frozen:
            raise TypeError(f"A configuration is a frozen dataclass, got {type(config).__name__}.")
        label = config.label
        if not label or label.startswith(".") or any(character in label for character in '/\\:*?"<>\n\0'):
            raise ValueError(f'The label {label!r} cannot name a folder. Leave out leading dots and / \\ : * ? " < >.')
    for label, count in Counter(config.label for config in configs).items():
        if count > 1:
            raise ValueError(f"{count} configurations have the label '{label}'. Put what distinguishes them in it.")
    units = [
        Unit(experiment.name, experiment.version, config, seed, options.quick)
        for config in configs
        for seed in range(options.seeds)
    ]
    if len({unit.digest for unit in units}) < len(units):
        raise ValueError(f"Two configurations of '{experiment.name}' differ in their labels only. Remove one of them.")
    return units


def in_running_order(units: Sequence[Unit]) -> list[Unit]:
    """The units in the order in which they start: seed by seed, within a seed the costly ones first."""
    return sorted(units, key=lambda unit: (unit.seed, -unit.cost))


def describe(value: Any) -> Any:
    """A value as JSON: a dataclass becomes its class name and its fields, a class or function its qualified name.

    >>> describe({"rank": (1, 2), "root": Path("data")})
    {'rank': [1, 2], 'root': 'data'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | {f.name: describe(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "__qualname__") and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(
        f"A configuration holds a {type(value).__name__}, which has no canonical description. "
        "Use plain values, tuples, dicts, frozen dataclasses, or classes and functions defined at the top of a module."
    )


def digest(value: Any) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the canonical JSON of a value, for any order of its keys."""
    canonical = json.dumps(describe(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def columns(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns of described configurations, label and all leaves, with one name for the same place in each.

    A leaf has the name of its field, with that of the outer one before it where several places have that name or where
    units and records have it; a nested dataclass is a column of its class name too, where that says more than the
    field's. A configuration that has no such place has None there.

    >>> columns([{"class": "C", "label": "a", "model": {"class": "MLP", "width": 3, "seed": 1}, "rate": 0.1}])
    [{'label': 'a', 'model': 'MLP', 'width': 3, 'model.seed': 1, 'rate': 0.1}]
    """
    leaves = [dict(_leaves(config, ())) for config in configs]
    paths = dict.fromkeys(path for found in leaves for path in found)
    count = Counter(path[-n:] for path in paths for n in range(1, len(path) + 1))
    count.update([("seed",), ("metric",), ("step",), ("value",)])  # of units and records
    names = {p: ".".join(next((p[-n:] for n in range(1, len(p)) if count[p[-n:]] == 1), p)) for p in paths}
    return [{names[path]: found.get(path) for path in paths} for found in leaves]


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    kind = str(value.get("class", ""))
    if path and kind and kind.lower() != path[-1]:
        yield path, kind
    for key, inner in value.items():
        if key != "class":
            yield from _leaves(inner, (*path, key))
