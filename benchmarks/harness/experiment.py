"""What an experiment is: an explicit grid of configurations, one run of each with each seed, and a report."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

Record = Mapping[str, Any]
"""``{"metric": str, "value": float, "step": int | None}``, and any further JSON values; without "step" it is None."""


class Config(Protocol):
    """One cell of the grid: a frozen dataclass of plain values and of further dataclasses, picklable.

    Its label is unique in the grid: the row of the tables and the run of TensorBoard. A class may add a property
    ``cost`` (default 1.0, any unit): among the runs of one seed the costly ones start first, so that the tail is short.
    """

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Options:
    """What the command line chose. An experiment with options of its own extends it and names it as `options_type`;
    a field is filled from the argument of the same name."""

    seeds: int = 5
    quick: bool = False
    dataset_root: Path | None = None


@dataclass(frozen=True)
class Context:
    """What a run may know beside its configuration.

    Everything that changes the numbers belongs in the configuration instead, because a finished run is recognised by
    configuration, seed and `quick` alone.
    """

    seed: int
    quick: bool
    dataset_root: Path | None
    tensorboard_dir: Path
    """For `TensorboardLogger`; what an interrupted run left there is gone."""


class Experiment(ABC):
    """A named question to answer with numbers.

    Import torch and Avalanche inside `configs` and `run` only, so that ``--help`` and ``report`` do not wait for them.
    The object travels to worker processes, so define its class at the top of a module.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increase it when the same configuration gives other numbers than before: finished runs then count no more."""
    options_type: ClassVar[type[Options]] = Options

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options that `options_type` adds; `one_of`, `positive` and `fraction` are argument types."""
        return None

    def variant(self, options: Any) -> str:
        """A suffix of the results folder, for options that ask a different question (such as the stream)."""
        return ""

    def prerequisite(self, options: Any) -> "tuple[Experiment, Options] | None":
        """An experiment to run first, in a folder of its own beside this one's, such as the tuning of the methods that
        this one reports on."""
        return None

    def settled(self, options: Any, results: "Results") -> Any:
        """The options with what the results of the prerequisite decide."""
        return options

    @abstractmethod
    def configs(self, options: Any) -> Sequence[Config]:
        """The grid, in the order of the tables; with `options.quick` a grid of seconds. Raise `UsageError` here for
        options that cannot be met, such as a data set that is absent."""

    @abstractmethod
    def run(self, config: Any, seed: int, context: Context) -> Iterable[Record]:
        """The records of one run. The random states of random, numpy and torch have just been seeded with `seed`."""

    @abstractmethod
    def report(self, results: "Results", out: Path) -> str:
        """Markdown over the results, which may be incomplete; its figures are PNG files in the folder `out`."""
