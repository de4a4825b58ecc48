"""What the comparison and its tuning share before anything is trained: the setting of a stream, and the options that
choose it. Importing this imports neither torch nor Avalanche, so that a wrong request is refused at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from benchmarks.harness import Options, UsageError
from benchmarks.harness.options import one_of, positive
from benchmarks.streams import SCENARIOS, STREAMS

if TYPE_CHECKING:
    from benchmarks.methods import Method

DEFAULT_STREAM = "permuted_digits"
MEASUREMENTS = 6  # of fidelity in each experience
STREAM, FIRST = PROTOCOLS = ("stream", "first")
EXPERIENCES = 3  # that tuning on the first ones sees


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Fidelity is measured every `fidelity_every` steps, 0 for never; `memory` is the part of the training examples that
    methods with a memory store, and that fidelity looks at; `validation` the part that is held out of them and tested
    on in place of the test stream, in tuning.
    """

    stream: str
    scenario: str
    experiences: int
    steps: int
    batch: int
    rate: float
    fidelity_every: int
    memory: float = 0.1
    test_limit: int | None = None
    validation: float = 0.0


@dataclass(frozen=True)
class Config:
    """A strategy, by its name, in one setting; `tuned_on` says where its strength was chosen, if it has one."""

    label: str
    strategy: str
    method: Method
    setting: Setting
    tuned_on: str | None = None


@dataclass(frozen=True)
class StreamOptions(Options):
    """The options of the comparison and of its tuning; None is what the stream has."""

    stream: Annotated[str, one_of("stream", STREAMS)] = DEFAULT_STREAM
    """what is learned; see the manual"""
    scenario: Annotated[str | None, one_of("scenario", SCENARIOS)] = None
    """task-, domain- or class-incremental; default: the stream's first"""
    strategy: tuple[str, ...] = ()
    """a strategy by its name in the manual, the beginning of one, 'CurvatureEWC*' for all that match, or all;
    repeatable; default: the ten that matter"""
    steps: Annotated[int | None, positive()] = None
    """of an experience; default: the literature's"""
    first: Annotated[int | None, positive("K")] = None
    """experiences that are tuned on with the protocol first; default: 3"""

    @property
    def its_scenario(self) -> str:
        """The one that was asked for, else the stream's first."""
        return self.scenario or STREAMS[self.stream].scenarios[0]

    def variant(self, suffix: str = "") -> str:
        """A folder's suffix for stream, scenario and steps where they are not the default."""
        usual = STREAMS[self.stream].scenarios[0]
        parts = [
            "" if self.stream == DEFAULT_STREAM else self.stream,
            "" if self.scenario in (None, usual) else self.scenario,
            f"{self.steps}steps" if self.steps else "",
            suffix,
        ]
        return "-".join(part for part in parts if part)

    def setting(self, every: int | None = None) -> Setting:
        """The setting of the stream, with fidelity `every` so many steps; with `quick`, two experiences of a few steps.
        Raises UsageError where data are absent, where the stream has not that scenario, and for a number of steps
        beside `quick`."""
        if self.quick and self.steps:
            raise UsageError("--quick takes six steps an experience: leave --quick out, or --steps.")
        stream, scenario = STREAMS[self.stream], self.its_scenario
        stream.check(self.dataset_root, scenario)
        recipe = stream.recipe
        steps = self.steps or recipe.steps
        setting = Setting(
            self.stream, scenario, stream.length(scenario), steps, recipe.batch, recipe.rate,
            fidelity_every=every or max(1, steps // MEASUREMENTS), memory=recipe.memory,
        )  # fmt: skip
        return replace(setting, experiences=2, steps=6, fidelity_every=2, test_limit=100) if self.quick else setting
