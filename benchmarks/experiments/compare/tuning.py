"""The strengths of the comparison, each chosen on seeds and examples that it never reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.compare.setting import (
    DEFAULT_STREAM,
    EXPERIENCES,
    FIRST,
    FIRST_SEED,
    PROTOCOLS,
    STREAM,
    Setting,
    add_stream_arguments,
    setting_for,
    variant,
)
from benchmarks.harness import Experiment, Options, UsageError, one_of
from benchmarks.harness.experiment import Context, Record
from benchmarks.harness.summary import Summary
from benchmarks.harness.tables import Column, table
from benchmarks.strategies import STRATEGIES, chosen
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

VALIDATION = 0.1


@dataclass(frozen=True)
class Strength:
    """One strength of one method."""

    label: str
    name: str
    strength: float
    method: Method
    setting: Setting


@dataclass(frozen=True)
class TuningOptions(Options):
    """None is what the stream has, or all strategies; `protocol` is to tune on the whole stream or on its `first`
    experiences."""

    stream: str = DEFAULT_STREAM
    scenario: str | None = None
    strategy: Sequence[str] | None = None
    steps: int | None = None
    protocol: str = STREAM
    first: int | None = None
    seeds: int = 1


class Tuning(Experiment):
    """Average accuracy on validation parts of the training examples, for each strength of each method.

    Protocols: *stream*, the accuracy at the end of the whole stream; *first*, at the end of its first experiences,
    which a learner could have known before it met the others (Chaudhry et al. 2019, Efficient lifelong learning with
    A-GEM).
    """

    name = "tune_compare"
    options_type = TuningOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_stream_arguments(parser, "--protocol first")
        parser.set_defaults(seeds=1)
        parser.add_argument("--protocol", type=one_of("protocol", PROTOCOLS), default=STREAM, help="stream or first")

    def variant(self, options: TuningOptions) -> str:
        return variant(options, f"{FIRST}{options.first or EXPERIENCES}" if options.protocol == FIRST else "")

    def configs(self, options: TuningOptions) -> Sequence[Strength]:
        setting = replace(setting_for(options), validation=VALIDATION, every=0)  # fidelity costs time
        if options.protocol == FIRST:
            setting = replace(setting, experiences=min(_first(options), setting.experiences))
        elif options.first:
            raise UsageError("--first is for the protocol 'first', on the stream's first experiences.")
        names = [name for name in chosen(setting.scenario, options.strategy) if STRATEGIES[name].grid]
        if not names:
            raise UsageError(f"{', '.join(options.strategy or ())}: without a strength, there is nothing to tune.")
        methods, tried = setting.methods(), slice(1 if options.quick else None)
        return [
            Strength(f"{name} at {strength:g}", name, strength, methods[name].with_strength(strength), setting)
            for name in names
            for strength in STRATEGIES[name].grid[tried]
        ]

    def run(self, config: Strength, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.compare.run import run

        records = run(config.method, config.setting, FIRST_SEED + seed, context)
        return [record for record in records if record["metric"] in ("average_accuracy", "forgetting", "seconds")]

    def report(self, results: Results, out: Path) -> str:
        chosen = best_strengths(results)
        (out / "strengths.json").write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
        found = accuracies(results)
        strengths = sorted({strength for tried in found.values() for strength in tried})
        rows = [[name, *(found[name].get(s) for s in strengths), f"{best:g}"] for name, best in chosen.items()]
        edges = [name for name, best in chosen.items() if best in (min(found[name]), max(found[name]))]
        columns = [Column("strategy"), *(Column(f"{s:g}") for s in strengths), Column("chosen")]
        setting: dict[str, Any] = results.headers[0]["config"]["setting"]
        return (
            f"# Strengths on {setting['stream']}, {setting['scenario']}-incremental\n\n"
            f"Average accuracy after {setting['experiences']} experiences of {setting['steps']} steps on the "
            f"{100 * setting['validation']:g} % of the training examples that were held out, seeds from {FIRST_SEED} "
            "on, by strength.\n\n" + table(columns, rows) + _on_edges(edges)
        )


def _first(options: TuningOptions) -> int:
    """How many experiences tuning sees; after a single one no strength has acted. Raises UsageError for other numbers
    than two up to the stream's."""
    stream = STREAMS[options.stream]
    length = stream.length(options.scenario or stream.scenarios[0])
    first = options.first or EXPERIENCES
    if not 2 <= first <= length:
        raise UsageError(f"--first {first}: '{options.stream}' can be tuned on its first 2 to {length} experiences.")
    return first


def _on_edges(names: Sequence[str]) -> str:
    return f"\n\nChosen at an end of the grid, so perhaps better beyond it: {', '.join(names)}." if names else ""


def accuracies(results: Results) -> dict[str, dict[float, Summary]]:
    """The average accuracy of each method, by strength."""
    found: dict[str, dict[float, Summary]] = {}
    for label in results.labels:
        accuracy, config = results.final("average_accuracy", label), results.config(label)
        if accuracy is not None:
            found.setdefault(config["name"], {})[config["strength"]] = accuracy
    return found


def best_strengths(results: Results) -> dict[str, float]:
    """The strength of the best mean accuracy for each method; among equal ones the smallest. Raises UsageError for a
    method that has no accuracy at any strength."""
    return {name: _best(name, tried) for name, tried in accuracies(results).items()}


def _best(name: str, tried: Mapping[float, Summary]) -> float:
    finite = [(accuracy.mean, -strength) for strength, accuracy in tried.items() if isfinite(accuracy.mean)]
    if not finite:
        raise UsageError(f"'{name}' diverged at every strength that was tried. Leave it out, by --strategy.")
    return -max(finite)[1]


experiment = Tuning()
