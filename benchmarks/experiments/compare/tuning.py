"""The strengths of the comparison, each chosen on seeds and examples that it never reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.compare import (
    EXPERIENCES,
    FIRST,
    PROTOCOLS,
    STREAM,
    CompareOptions,
    Setting,
    add_first_argument,
    add_stream_arguments,
    setting_for,
    strategies_of,
    variant,
)
from benchmarks.harness import Experiment, Options, UsageError, one_of
from benchmarks.harness.experiment import Context, Record
from benchmarks.harness.tables import Column, table
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

FIRST_SEED = 1000
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
    """As those of the comparison; `protocol` is to tune on the whole stream or on its `first` experiences."""

    stream: str = CompareOptions.stream
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
        add_stream_arguments(parser)
        parser.set_defaults(seeds=1)
        parser.add_argument("--protocol", type=one_of("protocol", PROTOCOLS), default=STREAM, help="stream or first")
        add_first_argument(parser, "--protocol first")

    def variant(self, options: TuningOptions) -> str:
        return variant(options, f"{FIRST}{options.first or EXPERIENCES}" if options.protocol == FIRST else "")

    def configs(self, options: TuningOptions) -> Sequence[Strength]:
        from benchmarks.experiments.compare.grid import strengths_to_try

        setting = replace(setting_for(options), validation=VALIDATION, every=0)  # fidelity costs time
        if options.protocol == FIRST:
            setting = replace(setting, experiences=min(_first(options), setting.experiences))
        elif options.first:
            raise UsageError("--first is for the protocol 'first', on the stream's first experiences.")
        to_try = strengths_to_try(setting, options.strategy)
        if not to_try:
            raise UsageError(f"{', '.join(options.strategy or ())}: without a strength, there is nothing to tune.")
        return [
            Strength(f"{name} at {strength:g}", name, strength, method, setting)
            for name, tried in to_try.items()
            for strength, method in (list(tried.items())[:1] if options.quick else tried.items())
        ]

    def run(self, config: Strength, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.compare.run import run

        records = run(config.method, config.setting, FIRST_SEED + seed, context)
        return [record for record in records if record["metric"] in ("average_accuracy", "forgetting", "seconds")]

    def report(self, results: Results, out: Path) -> str:
        chosen = best_strengths(results)
        (out / "strengths.json").write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
        tried = {label: results.config(label) for label in results.labels if results.config(label)}
        strengths = sorted({config["strength"] for config in tried.values()})
        rows = [
            [name, *(results.final("average_accuracy", f"{name} at {s:g}") for s in strengths), f"{best:g}"]
            for name, best in chosen.items()
        ]
        edges = [name for name, best in chosen.items() if best in _ends(tried.values(), name)]
        columns = [Column("strategy"), *(Column(f"{s:g}") for s in strengths), Column("chosen")]
        setting = next(iter(tried.values()))["setting"]
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


def _ends(configs: Iterable[dict[str, Any]], name: str) -> tuple[float, float]:
    """The least and the largest strength that was tried of a method."""
    strengths = [config["strength"] for config in configs if config["name"] == name]
    return min(strengths), max(strengths)


def _on_edges(names: Sequence[str]) -> str:
    return f"\n\nChosen at an end of the grid, so perhaps better beyond it: {', '.join(names)}." if names else ""


def best_strengths(results: Results) -> dict[str, float]:
    """The strength of the best mean accuracy for each method; among equal ones the smallest. Raises UsageError for a
    method that has no accuracy at any strength."""
    found: dict[str, list[tuple[float, float]]] = {}
    for label in results.labels:
        accuracy, config = results.final("average_accuracy", label), results.config(label)
        if accuracy is not None:
            known = found.setdefault(config["name"], [])
            if isfinite(accuracy.mean):
                known.append((accuracy.mean, -config["strength"]))
    for name, known in found.items():
        if not known:
            raise UsageError(f"'{name}' diverged at every strength that was tried. Leave it out, by --strategy.")
    return {name: -max(known)[1] for name, known in found.items()}


def tuning_for(options: CompareOptions) -> TuningOptions:
    """The tuning that a comparison asks for."""
    return TuningOptions(
        seeds=options.tuning_seeds or 1, quick=options.quick, dataset_root=options.dataset_root, stream=options.stream,
        scenario=options.scenario, strategy=strategies_of(options), steps=options.steps,
        protocol=options.tune or STREAM, first=options.first,
    )


experiment = Tuning()
