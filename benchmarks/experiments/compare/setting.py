"""What the comparison and its tuning share: the setting of a stream, and the options that choose it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.harness import UsageError, one_of, positive
from benchmarks.streams import SCENARIOS, STREAMS

if TYPE_CHECKING:
    from benchmarks.methods import Method

DEFAULT_STREAM = "permuted_digits"
MEASUREMENTS = 6  # of fidelity in each experience
STREAM, FIRST = PROTOCOLS = ("stream", "first")
EXPERIENCES = 3  # that tuning on the first ones sees
FIRST_SEED = 1000  # of tuning


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    `memory` is the part of the training examples that methods with a memory store, and that fidelity looks at;
    `validation` the part that is held out of them and tested on in place of the test stream, in tuning.
    """

    stream: str
    scenario: str
    experiences: int
    steps: int
    batch: int
    rate: float
    every: int
    memory: float = 0.1
    test_limit: int | None = None
    validation: float = 0.0

    def methods(self) -> dict[str, Method]:
        """All methods by name, with memories of this size."""
        from benchmarks.methods import methods

        return methods(self.memory)


def add_stream_arguments(parser: argparse.ArgumentParser, protocol: str) -> None:
    """The options of both; `protocol` is how tuning on the first experiences is asked for."""
    names = ", ".join(STREAMS)
    parser.add_argument("--stream", type=one_of("stream", STREAMS), default=DEFAULT_STREAM, help=f"one of {names}")
    parser.add_argument(
        "--scenario", type=one_of("scenario", SCENARIOS),
        help="task-, domain- or class-incremental; default: the stream's first",
    )
    parser.add_argument(
        "--strategy", action="append", metavar="NAME",
        help="one strategy, by its name in the table; repeatable (default: all)",
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="of an experience; default: the literature's")
    parser.add_argument(
        "--first", type=positive, metavar="K", help=f"experiences for {protocol} (default {EXPERIENCES})"
    )


def variant(options: Any, suffix: str = "") -> str:
    """A folder's suffix for stream, scenario and steps where they are not the default."""
    scenario = options.scenario or STREAMS[options.stream].scenarios[0]
    parts = [
        "" if options.stream == DEFAULT_STREAM else options.stream,
        "" if scenario == STREAMS[options.stream].scenarios[0] else scenario,
        f"{options.steps}steps" if options.steps else "",
        suffix,
    ]
    return "-".join(part for part in parts if part)


def setting_for(options: Any) -> Setting:
    """The setting of a stream; with `quick`, two experiences of a few steps. Raises UsageError where data are absent,
    where the stream has not that scenario, and for a number of steps beside `quick`."""
    if options.quick and options.steps:
        raise UsageError("--quick takes six steps an experience: leave --quick out, or --steps.")
    stream = STREAMS[options.stream]
    scenario = options.scenario or stream.scenarios[0]
    stream.check(options.dataset_root, scenario)
    recipe = stream.recipe
    steps = options.steps or recipe.steps
    setting = Setting(
        options.stream, scenario, stream.length(scenario), steps, recipe.batch, recipe.rate,
        every=getattr(options, "every", None) or max(1, steps // MEASUREMENTS), memory=recipe.memory,
    )
    return replace(setting, experiences=2, steps=6, every=2, test_limit=100) if options.quick else setting
