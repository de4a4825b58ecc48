"""Strengths for compare, on held-out examples and seeds that it never reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from benchmarks.experiments.compare.setting import (
    EXPERIENCES,
    FIRST,
    PROTOCOLS,
    STREAM,
    Config,
    Setting,
    StreamOptions,
)
from benchmarks.harness import Context, Experiment, Record, Results, Summary, UsageError
from benchmarks.harness.options import one_of, positive
from benchmarks.harness.tuning import FIRST_SEED, best
from benchmarks.strategies import ALL, STRATEGIES, chosen
from benchmarks.streams import STREAMS

VALIDATION = 0.1
KEPT = ("average_accuracy", "forgetting", "seconds")


@dataclass(frozen=True)
class TuningOptions(StreamOptions):
    """One seed and every strategy, unless asked for others."""

    seeds: Annotated[int, positive()] = 1
    """run seeds 1000 to 999 + SEEDS"""
    strategy: tuple[str, ...] = ()
    """a strategy by its name in the manual, the beginning of one, or 'CurvatureEWC*' for all that match; repeatable;
    default: all"""
    protocol: Annotated[str, one_of("protocol", PROTOCOLS)] = STREAM
    """tune on the whole stream, or on its first experiences"""


class Tuning(Experiment):
    """Average accuracy on validation parts of the training examples, for each strength of each method.

    Protocols: *stream*, the accuracy at the end of the whole stream; *first*, at the end of its first experiences,
    which a learner could have known before it met the others (Chaudhry et al. 2019, Efficient lifelong learning with
    A-GEM).
    """

    name = "tune_compare"
    options_type = TuningOptions

    def variant(self, options: TuningOptions) -> str:
        return options.variant(f"{FIRST}{options.first or EXPERIENCES}" if options.protocol == FIRST else "")

    def check(self, options: TuningOptions) -> None:
        """Raises UsageError where there is nothing to tune, and for a number of first experiences that the protocol or
        the stream has no use for."""
        _names(options)
        _setting(options)

    def configs(self, options: TuningOptions) -> Sequence[Config]:
        """Every strength of the grid of each strategy that has one. Raises UsageError as `check` does."""
        from benchmarks.methods import methods  # needs torch

        names, setting = _names(options), _setting(options)
        by_name, tried = methods(setting.memory), slice(1 if options.quick else None)
        return [
            Config(f"{name} at {strength:g}", name, by_name[name].with_strength(strength), setting)
            for name in names
            for strength in STRATEGIES[name].grid[tried]
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.compare.run import run  # needs torch and Avalanche

        records = run(config.method, config.setting, FIRST_SEED + seed, context)
        return [record for record in records if record["metric"] in KEPT]


def _names(options: TuningOptions) -> list[str]:
    """The strategies that have a strength. Raises UsageError where there are none."""
    names = chosen(options.its_scenario, options.strategy or [ALL])
    tunable = [name for name in names if STRATEGIES[name].grid]
    if not tunable:
        raise UsageError(f"{', '.join(names)}: without a strength, there is nothing to tune.")
    return tunable


def _setting(options: TuningOptions) -> Setting:
    """The setting of the stream, with a part held out of training and the experiences that the protocol sees. Raises
    UsageError for a number of them that it has no use for."""
    setting = replace(options.setting(), validation=VALIDATION, fidelity_every=0)  # fidelity costs time
    if options.protocol == FIRST:
        return replace(setting, experiences=min(_first(options), setting.experiences))
    if options.first:
        raise UsageError("--first is for the protocol 'first', on the stream's first experiences.")
    return setting


def _first(options: TuningOptions) -> int:
    """How many experiences tuning sees; after a single one no strength has acted. Raises UsageError for other numbers
    than two up to the stream's."""
    stream = STREAMS[options.stream]
    length = stream.length(options.its_scenario)
    first = options.first or EXPERIENCES
    if not 2 <= first <= length:
        raise UsageError(f"--first {first}: '{options.stream}' can be tuned on its first 2 to {length} experiences.")
    return first


def accuracies(results: Results) -> dict[str, dict[float, Summary]]:
    """The average accuracy of each strategy, by strength."""
    found: dict[str, dict[float, Summary]] = {}
    for one in results.each():
        accuracy, row = one.final("average_accuracy"), one.first
        if accuracy is not None:
            found.setdefault(row["strategy"], {})[row["strength"]] = accuracy
    return found


def best_strengths(results: Results) -> dict[str, float]:
    """The strength of the best mean accuracy for each strategy; among equal ones the smallest. Raises UsageError for a
    strategy that has no accuracy at any strength."""
    found = accuracies(results)
    chosen = best((name, strength, accuracy) for name, tried in found.items() for strength, accuracy in tried.items())
    for name in found:
        if name not in chosen:
            raise UsageError(f"'{name}' diverged at every strength that was tried. Leave it out, by --strategy.")
    return chosen


experiment = Tuning()
