"""What a stream is: a benchmark by name, in one or more scenarios, with a network and a recipe for training on it."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.streams.networks import Network
from benchmarks.streams.scenario import SCENARIOS, TASK
from benchmarks.streams.sources import UNREADABLE, Source

if TYPE_CHECKING:
    from torch import nn

Maker = Callable[[int, "Path | None", str, int], Any]
"""(seed, dataset_root, scenario, experiences) ↦ an Avalanche benchmark of the first so many experiences."""


@dataclass(frozen=True)
class Recipe:
    """How the literature trains: so many steps an experience on batches of a size, with Adam at a rate, and the part of
    all training examples that a method with a memory stores."""

    steps: int
    batch: int
    rate: float
    memory: float
    source: str


@dataclass(frozen=True, eq=False)
class Stream:
    """A benchmark of `experiences` experiences (fewer in some scenarios, as `lengths` says).

    `outputs` names its scenarios, the default one first, and how many logits a head has in each.
    """

    maker: Maker
    experiences: int
    outputs: Mapping[str, int]
    network: Network
    recipe: Recipe
    source: Source | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Scenarios that have fewer experiences."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        return tuple(self.outputs)

    def length(self, scenario: str) -> int:
        """How many experiences there are in a scenario."""
        return self.lengths.get(scenario, self.experiences)

    def check(self, name: str, dataset_root: Path | None, scenario: str | None = None) -> None:
        """Raises UsageError for a scenario that the stream has not, and for data that cannot be had: absent below
        `dataset_root`, or, where that is None, neither downloaded before nor now."""
        self._scenario(scenario, f"stream '{name}'")
        if self.source is None:
            return
        if dataset_root is not None:
            self.source.check(dataset_root)
        elif self.source.missing(_folder(self.source)):
            self.make(0, None)  # once and here, before several workers download to the same place

    def make(
        self, seed: int, dataset_root: Path | None, scenario: str | None = None, experiences: int | None = None
    ) -> Any:
        """The Avalanche benchmark of the first `experiences` experiences, by default of all; task labels count in TASK
        and are 0 otherwise. Global random states stay as they are. The last benchmark is kept for the next call.

        Raises UsageError as `check` does, for data that are damaged, and for more experiences than there are.
        """
        count = self.experiences if experiences is None else experiences
        if not 1 <= count <= self.experiences:
            raise UsageError(f"the stream has {self.experiences} experiences; got {count}. Ask for 1 to that many.")
        wanted = self, seed, dataset_root, self._scenario(scenario), count
        made = _LAST.get(wanted)
        if made is None:
            _LAST.clear()  # first, so that two are not kept at once
            made = _LAST[wanted] = _made(*wanted)
        return made

    def model(self, scenario: str | None = None) -> nn.Module:
        """A network drawn from torch's current random state: with one head whose outputs are all there from the start;
        in TASK with a head for each experience, an Avalanche `MultiTaskModule`."""
        from benchmarks.streams.heads import many_heads, one_head

        scenario = self._scenario(scenario)
        head = self.network.body(), self.network.features, self.outputs[scenario]
        return many_heads(*head, self.experiences) if scenario == TASK else one_head(*head)

    def _scenario(self, given: str | None, name: str = "this stream") -> str:
        if given is None:
            return self.scenarios[0]
        if given not in SCENARIOS:
            raise UsageError(unknown("scenario", given, SCENARIOS))
        if given not in self.outputs:
            raise UsageError(f"{name} has no scenario '{given}'. It has: {', '.join(self.scenarios)}.")
        return given


_LAST: dict[tuple, Any] = {}
"""The benchmark made last, as the runs of one seed follow each other."""


def _made(stream: Stream, seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    import torch

    source = stream.source
    if source is not None and root is not None:
        source.check(root)
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):  # Avalanche seeds torch, and prints
            return stream.maker(seed, root, scenario, experiences)
    except UNREADABLE as error:
        if source is None:
            raise
        raise source.unreadable(root, error) from error


def _folder(source: Source) -> Path:
    """Where a source that Avalanche downloaded lies as it does below --dataset-root."""
    from avalanche.benchmarks.datasets import default_dataset_location

    folder = default_dataset_location(source.downloaded)
    return folder.parent if source.place == source.downloaded else folder
