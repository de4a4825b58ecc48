"""Strengths for compare, on held-out examples and seeds that it never reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated

from benchmarks.experiments.compare.run import (
    EXPERIENCES,
    FIRST,
    FIRST_SEED,
    PROTOCOLS,
    STREAM,
    Config,
    StreamOptions,
    run,
)
from benchmarks.harness import Context, Experiment, Record, Results, Summary, UsageError
from benchmarks.harness.options import one_of, positive
from benchmarks.methods import methods
from benchmarks.strategies import STRATEGIES, chosen
from benchmarks.streams import STREAMS

VALIDATION = 0.1
KEPT = ("average_accuracy", "forgetting", "seconds")


@dataclass(frozen=True)
class TuningOptions(StreamOptions):
    """One seed unless asked for others."""

    seeds: Annotated[int, positive()] = 1
    """run seeds 1000 to 999 + SEEDS"""
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

    def configs(self, options: TuningOptions) -> Sequence[Config]:
        """Every strength of the grid of each strategy that has one. Raises UsageError where there is none, and for a
        number of first experiences that the protocol or the stream has no use for."""
        setting = replace(options.setting(), validation=VALIDATION, fidelity_every=0)  # fidelity costs time
        if options.protocol == FIRST:
            setting = replace(setting, experiences=min(_first(options), setting.experiences))
        elif options.first:
            raise UsageError("--first is for the protocol 'first', on the stream's first experiences.")
        names = [name for name in chosen(setting.scenario, options.strategy or None) if STRATEGIES[name].grid]
        if not names:
            raise UsageError(f"{', '.join(options.strategy)}: without a strength, there is nothing to tune.")
        by_name, tried = methods(setting.memory), slice(1 if options.quick else None)
        return [
            Config(f"{name} at {strength:g}", name, by_name[name].with_strength(strength), setting)
            for name in names
            for strength in STRATEGIES[name].grid[tried]
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        records = run(config.method, config.setting, FIRST_SEED + seed, context)
        return [record for record in records if record["metric"] in KEPT]


def _first(options: TuningOptions) -> int:
    """How many experiences tuning sees; after a single one no strength has acted. Raises UsageError for other numbers
    than two up to the stream's."""
    stream = STREAMS[options.stream]
    length = stream.length(options.scenario or stream.scenarios[0])
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
    best = {}
    for name, tried in accuracies(results).items():
        finite = [(accuracy.mean, -strength) for strength, accuracy in tried.items() if isfinite(accuracy.mean)]
        if not finite:
            raise UsageError(f"'{name}' diverged at every strength that was tried. Leave it out, by --strategy.")
        best[name] = -max(finite)[1]
    return best


experiment = Tuning()
