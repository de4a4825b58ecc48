"""The main comparison: the strategies of this package beside Avalanche's own, on one stream in one scenario."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Experiment, Options, UsageError, one_of, positive
from benchmarks.harness.experiment import Context, Record
from benchmarks.streams import SCENARIOS, STREAMS

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

DEFAULT_STREAM = "permuted_digits"
MEASUREMENTS = 6  # of fidelity in each experience
STREAM, FIRST = PROTOCOLS = ("stream", "first")
EXPERIENCES = 3  # that tuning on the first ones sees
BASELINE = "Naive"


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


@dataclass(frozen=True)
class Config:
    """One method in one setting; `tuned_on` says where its strength was chosen, if it has one."""

    label: str
    method: Method
    setting: Setting
    tuned_on: str | None = None


@dataclass(frozen=True)
class CompareOptions(Options):
    """What `add_arguments` says of each; None is what the stream has. `strengths` are what tuning has found."""

    stream: str = DEFAULT_STREAM
    scenario: str | None = None
    strategy: Sequence[str] | None = None
    steps: int | None = None
    every: int | None = None
    tune: str | None = None
    first: int | None = None
    tuning_seeds: int | None = None
    baseline: str = BASELINE
    strengths: Sequence[tuple[str, float]] = ()
    seeds: int = 2


class Compare(Experiment):
    """Average accuracy, forgetting, seconds and stored bytes of each method, with fidelity along each trajectory."""

    name = "compare"
    version = 2  # since Adam is fused and accuracy is that of `strategy.eval`
    options_type = CompareOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_stream_arguments(parser)
        parser.set_defaults(seeds=2, strengths=())  # two seeds, so that the first look takes minutes
        parser.add_argument("--every", type=positive, metavar="N", help="measure fidelity every N steps")
        parser.add_argument(
            "--tune", type=one_of("protocol", PROTOCOLS),
            help="choose each strength first, on validation parts with seeds from 1000 on: on the whole stream, or on "
            "its first experiences only (Chaudhry et al. 2019)",
        )
        add_first_argument(parser, "--tune first")
        parser.add_argument("--tuning-seeds", type=positive, metavar="N", help="for --tune (default 1)")
        parser.add_argument("--baseline", default=BASELINE, help="what differences are tested against (default Naive)")

    def variant(self, options: CompareOptions) -> str:
        count = options.first or EXPERIENCES if options.tune == FIRST else ""
        return variant(options, f"tuned-{options.tune}{count}" if options.tune else "")

    def prerequisite(self, options: CompareOptions) -> tuple[Experiment, Options] | None:
        from benchmarks.experiments.compare.tuning import experiment, tuning_for
        from benchmarks.methods import STRATEGIES

        configs = self.configs(options)  # what cannot be met is said before the tuning
        if not options.tune and (options.first or options.tuning_seeds):
            raise UsageError("--first and --tuning-seeds are for tuning: add --tune stream or --tune first.")
        tuned = options.tune and any(STRATEGIES[config.label].grid for config in configs)
        return (experiment, tuning_for(options)) if tuned else None

    def settled(self, options: CompareOptions, results: Results) -> CompareOptions:
        from benchmarks.experiments.compare.tuning import best_strengths

        return replace(options, strengths=tuple(best_strengths(results).items()))

    def configs(self, options: CompareOptions) -> Sequence[Config]:
        from benchmarks.experiments.compare.grid import configs

        return configs(setting_for(options), strategies_of(options), dict(options.strengths), options.baseline)

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.compare.run import run

        return run(config.method, config.setting, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.compare.report import report

        return report(results, out)


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """What compare and its tuning share."""
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


def add_first_argument(parser: argparse.ArgumentParser, protocol: str) -> None:
    parser.add_argument(
        "--first", type=positive, metavar="K", help=f"experiences for {protocol} (default {EXPERIENCES})"
    )


def strategies_of(options: CompareOptions) -> Sequence[str] | None:
    """The names that were asked for, and the baseline with them; None for all."""
    return None if options.strategy is None else list(dict.fromkeys([*options.strategy, options.baseline]))


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
    stream.check(options.stream, options.dataset_root, scenario)
    recipe = stream.recipe
    steps = options.steps or recipe.steps
    setting = Setting(
        options.stream, scenario, stream.length(scenario), steps, recipe.batch, recipe.rate,
        every=getattr(options, "every", None) or max(1, steps // MEASUREMENTS), memory=recipe.memory,
    )
    return replace(setting, experiences=2, steps=6, every=2, test_limit=100) if options.quick else setting


experiment = Compare()
