"""One run of the speed experiment."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.experiments.speed.mitigators import mitigated, mitigated_on_images
from benchmarks.experiments.speed.passes import estimates, fidelities, instruments
from benchmarks.experiments.speed.projections import merges, projected
from benchmarks.experiments.speed.steps import measured, steps
from benchmarks.experiments.speed.suite import suite
from benchmarks.experiments.speed.timing import Times
from benchmarks.harness.experiment import Record

if TYPE_CHECKING:
    from benchmarks.experiments.speed import Config

GROUPS: dict[str, Callable[[Config], Times]] = {
    "step": steps,
    "estimate": estimates,
    "fidelity": fidelities,
    "on": instruments,
    "measured": measured,
    "mitigated": mitigated,
    "images": mitigated_on_images,
    "projected": projected,
    "merge": merges,
    "suite": suite,
}


def run(config: Config) -> list[Record]:
    """Times in milliseconds and ratios to the first of each group."""
    records: list[Record] = []
    for group, measure in GROUPS.items():
        times = measure(config)
        base = next(iter(times.values()))
        for name, values in times.items():
            ratio = statistics.median(value / reference for value, reference in zip(values, base))
            records += [
                {"metric": f"{group}/{name}/milliseconds", "value": 1e3 * statistics.median(values)},
                {"metric": f"{group}/{name}/ratio", "value": ratio, "timing": True},
            ]
    return records

