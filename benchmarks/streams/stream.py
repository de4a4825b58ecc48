"""What a stream is: a benchmark by name, in one or more scenarios, with a network and a recipe for training on it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.data import UNREADABLE, Source
from benchmarks.harness.errors import UsageError, unknown
from benchmarks.streams.scenario import SCENARIOS, TASK

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.streams.features import Features


class Network(Protocol):
    """A kind of network; its body gives vectors of `features` to a head."""

    @property
    def features(self) -> int: ...

    def body(self) -> nn.Sequential:
        """Drawn from torch's current random state."""


@dataclass(frozen=True)
class Mlp:
    """A ReLU network with hidden layers of these widths, over flattened inputs."""

    inputs: int
    hidden: tuple[int, ...]

    @property
    def features(self) -> int:
        return self.hidden[-1]

    def body(self) -> nn.Sequential:
        from torch import nn

        from benchmarks.networks import mlp

        return nn.Sequential(nn.Flatten(), *mlp(self.inputs, *self.hidden), nn.ReLU())


@dataclass(frozen=True)
class ResNet18:
    """Avalanche's `SlimResNet18` with `width` channels in its first layer (20 in Lopez-Paz & Ranzato 2017; 64 is the
    ResNet-18 of Buzzega et al. 2020) and a mean over what is left of the image, so that it takes any size."""

    width: int = 20

    @property
    def features(self) -> int:
        return 8 * self.width

    def body(self) -> nn.Sequential:
        from avalanche.models import SlimResNet18
        from torch import nn

        net = SlimResNet18(1, self.width)
        blocks = (net.layer1, net.layer2, net.layer3, net.layer4)
        return nn.Sequential(net.conv1, net.bn1, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


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
    """A benchmark of `experiences` experiences (fewer in some scenarios, as `lengths` says), made by the function of
    its name in `benchmarks.streams.makers`.

    `outputs` names its scenarios, the default one first, and how many logits a head has in each.
    """

    name: str
    experiences: int
    outputs: Mapping[str, int]
    network: Network
    recipe: Recipe
    source: Source | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Scenarios that have fewer experiences."""
    seen: Features | None = None
    """Images through a frozen map, which are the benchmark instead of a function's."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        return tuple(self.outputs)

    def length(self, scenario: str) -> int:
        """How many experiences there are in a scenario."""
        return self.lengths.get(scenario, self.experiences)

    def check(self, dataset_root: Path | None, scenario: str | None = None) -> None:
        """Raises UsageError for a scenario that the stream has not, and for data that cannot be had: absent below
        `dataset_root`, or, where that is None, neither downloaded before nor now."""
        self._scenario(scenario)
        if self.seen is not None:
            self.seen.ready(dataset_root)
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
        from torch import nn

        from benchmarks.networks import many_heads

        scenario, body, features = self._scenario(scenario), self.network.body(), self.network.features
        outputs = self.outputs[scenario]
        if scenario == TASK:
            return many_heads(body, features, outputs, self.experiences)
        return nn.Sequential(*body, nn.Linear(features, outputs))

    def _scenario(self, given: str | None) -> str:
        if given is None:
            return self.scenarios[0]
        if given not in SCENARIOS:
            raise UsageError(unknown("scenario", given, SCENARIOS))
        if given not in self.outputs:
            raise UsageError(f"stream '{self.name}' has no scenario '{given}'. It has: {', '.join(self.scenarios)}.")
        return given


_LAST: dict[tuple, Any] = {}
"""The benchmark made last, as the runs of one seed follow each other."""


def _made(stream: Stream, seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    import torch

    from benchmarks.streams import makers

    source = stream.source
    if source is not None and root is not None:
        source.check(root)
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):  # Avalanche seeds torch, and prints
            if stream.seen is not None:
                return stream.seen.benchmark(seed, root, scenario, experiences, of=stream.experiences)
            return getattr(makers, stream.name)(seed, root, scenario, experiences)
    except UNREADABLE as error:
        if source is None:
            raise
        raise source.unreadable(root, error) from error


def _folder(source: Source) -> Path:
    """Where a source that Avalanche downloaded lies as it does below --dataset-root."""
    from avalanche.benchmarks.datasets import default_dataset_location

    folder = default_dataset_location(source.downloaded)
    return folder.parent if source.place == source.downloaded else folder
