"""Time of a penalty step, of estimates, metrics and mitigators, as ratios to plain training work.

Medians of interleaved rounds in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.experiments.languages.experiment import QUICK, SETTINGS, Setting
from benchmarks.experiments.speed import attached, mitigators, passes, steps, suite
from benchmarks.experiments.speed.changes import noise
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.timing import Repetitions

GROUPS = {
    "step": steps.penalised,
    "attached": attached.on_mlp,
    "attached_small": attached.on_small_gpt,
    "attached_medium": attached.on_medium_gpt,
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
"""Each returns the seconds of each of its works in each round, the reference first."""


@dataclass(frozen=True)
class Config:
    """An MLP 784-hidden-hidden-10 on synthetic inputs; `rounds` interleaved repetitions. Mitigators are timed in rounds
    of `period` steps of an MLP with four hidden layers of `width`, and on ResNet-18 with batches of `images`; the
    attached penalty also on the `small` and the `medium` GPT of the experiment `languages`."""

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
    small: Setting = SETTINGS["small"]
    medium: Setting = SETTINGS["medium"]


class Speed(Experiment):
    """Times of a penalty step, of estimates and of fidelity, each relative to plain training work on the same data."""

    name = "speed"
    options_type = Repetitions
    jobs = 1  # a second one would disturb the times

    def configs(self, options: Options) -> Sequence[Config]:
        few = {"examples": 64, "batch": 16, "experiences": 2, "stored": 10, "rounds": 1, "steps": 3, "period": 2}
        small = Config("MLP 784-10-10-10", hidden=10, width=8, images=2, small=QUICK, medium=QUICK, **few)
        return [small if options.quick else Config()]

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Times in milliseconds, and ratios to the first of each group with their noise."""
        records: list[Record] = []
        for group, measure in GROUPS.items():
            times = measure(config)
            base = next(iter(times.values()))
            for name, values in times.items():
                ratios = [value / reference for value, reference in zip(values, base)]
                records += [
                    {"metric": f"{group}/{name}/milliseconds", "value": 1e3 * statistics.median(values)},
                    {"metric": f"{group}/{name}/ratio", "value": statistics.median(ratios), "timing": True},
                    {"metric": f"{group}/{name}/noise", "value": noise(ratios), "timing": True},
                ]
        return records


experiment = Speed()
