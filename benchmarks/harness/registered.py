"""An entry of the registry, and its lazy import."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.experiment import Experiment


@dataclass(frozen=True)
class Registered:
    """Where an experiment is (``module:attribute``) and what it shows, in one line."""

    target: str
    summary: str


def load(name: str, experiments: Mapping[str, Registered]) -> Experiment:
    """Import the experiment of that name."""
    if name not in experiments:
        raise UsageError(unknown("experiment", name, experiments))
    module, _, attribute = experiments[name].target.partition(":")
    experiment = getattr(import_module(module), attribute)
    if experiment.name != name:
        target = experiments[name].target
        raise ValueError(f"{target} is named '{experiment.name}' but registered as '{name}'. Make them equal.")
    return experiment
