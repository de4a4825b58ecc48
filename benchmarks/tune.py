"""Strengths for the other experiments, chosen on seeds that they never report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare import DEFAULT_STREAM, CompareOptions, setting_for
from benchmarks.harness import Experiment, Options, one_of
from benchmarks.harness.experiment import Context, Record
from benchmarks.harness.tables import Column, table
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
FIRST_SEED = 1000


@dataclass(frozen=True)
class Config:
    """One strength of one method; `inner` is its configuration in the experiment that is tuned."""

    label: str
    method: str
    strength: float
    inner: Any


@dataclass(frozen=True)
class TuneOptions(Options):
    """`target` is `compare`, on a stream, or `refresh`."""

    target: str = "compare"
    stream: str = DEFAULT_STREAM


class Tune(Experiment):
    """Final average accuracy for each strength of each method, on seeds from 1000 on."""

    name = "tune"
    options_type = TuneOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--target", type=one_of("experiment", ("compare", "refresh")), default="compare")
        parser.add_argument("--stream", type=one_of("stream", STREAMS), default=DEFAULT_STREAM)

    def variant(self, options: TuneOptions) -> str:
        return "refresh" if options.target == "refresh" else options.stream

    def configs(self, options: TuneOptions) -> Sequence[Config]:
        inner = self._refresh(options) if options.target == "refresh" else self._compare(options)
        return [
            Config(f"{name} at {strength:g}", name, strength, config)
            for name, make in inner.items()
            for strength in (GRID[:1] if options.quick else GRID)
            for config in [make(strength)]
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks import compare_run, refresh_run

        seed += FIRST_SEED
        if hasattr(config.inner, "setting"):
            records = compare_run.run(config.inner.method, config.inner.setting, seed, context)
            name = "average_accuracy"
        else:
            records, name = refresh_run.run(config.inner, seed, context), "final/accumulate/all_accuracy"
        return [{"metric": "accuracy", "value": r["value"]} for r in records if r["metric"] == name]

    def report(self, results: Results, out: Path) -> str:
        names = list(dict.fromkeys(label.rsplit(" at ", 1)[0] for label in results.labels))
        rows: list[list] = []
        for name in names:
            cells = {s: results.final("accuracy", f"{name} at {s:g}") for s in GRID}
            known = {s: cell.mean for s, cell in cells.items() if cell and cell.mean == cell.mean}
            rows.append([name, *cells.values(), f"{max(known, key=lambda s: known[s]):g}" if known else "–"])
        columns = [Column("method"), *(Column(f"λ = {s:g}") for s in GRID), Column("best λ")]
        return f"# Average accuracy by strength, seeds from {FIRST_SEED} on\n\n" + table(columns, rows)

    def _compare(self, options: TuneOptions) -> dict[str, Any]:
        from benchmarks.compare import Config as Inner
        from benchmarks.grid import EQUAL_TO_FISHER, methods

        chosen = CompareOptions(options.seeds, options.quick, options.dataset_root, options.stream)
        setting = replace(setting_for(chosen), every=10**6)  # fidelity costs time and is not needed here
        return {
            label: lambda strength, label=label, method=method: Inner(
                label, replace(method, strength=strength), setting
            )
            for label, method in methods().items()
            if hasattr(method, "strength") and not any(f" {kind}," in label for kind in EQUAL_TO_FISHER)
        }

    def _refresh(self, options: TuneOptions) -> dict[str, Any]:
        from benchmarks.refresh import experiment

        configs = (replace(config, every=33) for config in experiment.configs(options))  # step 99, the last, too
        return {
            config.label: lambda strength, config=config: replace(config, strength=strength)
            for config in configs
            if config.policy is not None
        }


experiment = Tune()
