"""The units of work, one per configuration and seed, and the digest by which a finished one is recognised."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness.experiment import Config, Experiment, Options


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
    """The first 12 hexadecimal digits of the SHA-256 of the canonical JSON of a value; the order of keys is nothing."""
    canonical = json.dumps(describe(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


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
    """All units of an experiment, in the order of its configurations."""
    configs = list(experiment.configs(options))
    _check(configs)
    units = [
        Unit(experiment.name, experiment.version, config, seed, options.quick)
        for config in configs
        for seed in range(options.seeds)
    ]
    if len({unit.digest for unit in units}) < len(units):
        raise ValueError(f"Two configurations of '{experiment.name}' differ in their labels only. Remove one of them.")
    return units


def in_running_order(units: Sequence[Unit]) -> list[Unit]:
    """All configurations of one seed before the next seed; within a seed the costly ones first."""
    return sorted(units, key=lambda unit: (unit.seed, -unit.cost))


def _check(configs: Sequence[Config]) -> None:
    if not configs:
        raise ValueError("The grid is empty. Return at least one configuration from `configs`.")
    labels: set[str] = set()
    for config in configs:
        if not is_dataclass(config) or not type(config).__dataclass_params__.frozen:
            raise TypeError(f"A configuration is a frozen dataclass, got {type(config).__name__}.")
        label = config.label
        if not label or label.startswith(".") or any(character in label for character in '/\\:*?"<>\n\0'):
            raise ValueError(f'The label {label!r} cannot name a folder. Leave out leading dots and / \\ : * ? " < >.')
        if label in labels:
            raise ValueError(f"Two configurations have the label '{label}'. Put what distinguishes them in the label.")
        labels.add(label)
