"""What curvature costs: ratios of times measured in one process, interleaved, medians."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.speed.report import report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.harness.results import Results


@dataclass(frozen=True)
class Config:
    """An MLP 784-hidden-hidden-10 on synthetic inputs; `rounds` interleaved repetitions. Mitigators are timed in rounds
    of `period` steps of an MLP with four hidden layers of `width`, and on ResNet-18 with batches of `images`."""

    label: str = "MLP 784-400-400-10"
    hidden: int = 400
    examples: int = 5120
    batch: int = 128
    experiences: int = 20
    stored: int = 100
    rounds: int = 15
    steps: int = 20
    period: int = 256
    width: int = 256
    images: int = 32


class Speed(Experiment):
    """Times of a penalty step, of estimates and of fidelity, each relative to plain training work on the same data."""

    name = "speed"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(seeds=1, jobs=1)  # each seed repeats the measurement; a second job would disturb it

    def configs(self, options: Options) -> Sequence[Config]:
        few = {"examples": 256, "experiences": 3, "rounds": 2, "steps": 3, "period": 4, "images": 2}
        small = Config("MLP 784-40-40-10", hidden=40, width=32, **few)
        return [small if options.quick else Config()]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        return run(config)

    def report(self, results: Results, out: Path) -> str:
        return report(results)


def run(config: Config) -> list[Record]:
    """Times in milliseconds and ratios to the first of each group."""
    from benchmarks.experiments.speed import mitigators, passes, steps, suite

    groups = {
        "step": steps.penalised,
        "estimate": passes.estimates,
        "fidelity": passes.fidelities,
        "on": passes.instruments,
        "measured": steps.measured,
        "mitigated": mitigators.mitigated,
        "images": mitigators.mitigated_on_images,
        "projected": steps.projected,
        "merge": passes.merges,
        "suite": suite.suite,
    }
    records: list[Record] = []
    for group, measure in groups.items():
        times = measure(config)
        base = next(iter(times.values()))
        for name, values in times.items():
            ratio = statistics.median(value / reference for value, reference in zip(values, base))
            records += [
                {"metric": f"{group}/{name}/milliseconds", "value": 1e3 * statistics.median(values)},
                {"metric": f"{group}/{name}/ratio", "value": ratio, "timing": True},
            ]
    return records


experiment = Speed()
