"""The strengths of the comparison, each chosen on seeds and examples that it never reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare import (
    FIRST,
    PROTOCOLS,
    STREAM,
    CompareOptions,
    Setting,
    add_stream_arguments,
    setting_for,
    strategies_of,
    variant,
)
from benchmarks.harness import Experiment, Options, UsageError, one_of, positive
from benchmarks.harness.experiment import Context, Record
from benchmarks.harness.tables import Column, table

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
    first: int = CompareOptions.first
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
        parser.add_argument("--first", type=positive, default=3, help="experiences for --protocol first (default 3)")

    def variant(self, options: TuningOptions) -> str:
        return variant(options, f"{FIRST}{options.first}" if options.protocol == FIRST else "")

    def configs(self, options: TuningOptions) -> Sequence[Strength]:
        from benchmarks.compare.grid import strengths_to_try

        setting = replace(setting_for(options), validation=VALIDATION, every=0)  # fidelity costs time
        if options.protocol == FIRST:
            setting = replace(setting, experiences=min(options.first, setting.experiences))
        return [
            Strength(f"{name} at {strength:g}", name, strength, method, setting)
            for name, tried in strengths_to_try(setting, options.strategy).items()
            for strength, method in (list(tried.items())[:1] if options.quick else tried.items())
        ]

    def run(self, config: Strength, seed: int, context: Context) -> Sequence[Record]:
        from avalanche_curv.core import NonFiniteCurvatureError
        from benchmarks.compare.run import run

        try:
            records = run(config.method, config.setting, FIRST_SEED + seed, context)
        except NonFiniteCurvatureError:  # the strength is too large
            return [{"metric": "average_accuracy", "value": nan}]
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
        seeds=options.tuning_seeds, quick=options.quick, dataset_root=options.dataset_root, stream=options.stream,
        scenario=options.scenario, strategy=strategies_of(options), steps=options.steps,
        protocol=options.tune or STREAM, first=options.first,
    )


experiment = Tuning()
