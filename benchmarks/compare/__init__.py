"""The main comparison: CurvatureEWC in each kind and policy beside Avalanche's own strategies, on one stream."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Experiment, Options, one_of, positive
from benchmarks.harness.experiment import Context, Record
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share."""

    stream: str
    experiences: int
    steps: int
    batch: int = 64
    rate: float = 3e-3
    every: int = 10
    test_limit: int = 1000


@dataclass(frozen=True)
class Config:
    """One method in one setting."""

    label: str
    method: Method
    setting: Setting


@dataclass(frozen=True)
class CompareOptions(Options):
    """`stream` is one of `benchmarks.streams`; fidelity is measured every `every` steps."""

    stream: str = "permuted_digits"
    every: int = 10
    seeds: int = 2


QUICK_ON_LARGE = ("Naive", "CurvatureEWC Fisher, refresh")
DEFAULT_STREAM = "permuted_digits"
STEPS = {"sine": 100, "permuted_mnist": 300, "split_mnist": 300}


class Compare(Experiment):
    """Average accuracy, forgetting, seconds and stored bytes of each method, with fidelity along each trajectory."""

    name = "compare"
    options_type = CompareOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--stream", type=one_of("stream", STREAMS), default=DEFAULT_STREAM, help=f"one of {', '.join(STREAMS)}"
        )
        parser.set_defaults(seeds=2)  # so that the first look takes minutes
        parser.add_argument("--every", type=positive, default=10, help="measure fidelity every so many steps")

    def variant(self, options: CompareOptions) -> str:
        return "" if options.stream == DEFAULT_STREAM else options.stream

    def configs(self, options: CompareOptions) -> Sequence[Config]:
        from benchmarks.compare.grid import methods

        setting = setting_for(options)
        large = options.quick and STREAMS[options.stream].downloads  # loading takes minutes for each method
        chosen = {label: method for label, method in methods().items() if not large or label in QUICK_ON_LARGE}
        return [Config(label, method, setting) for label, method in chosen.items()]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.compare.run import run

        return run(config.method, config.setting, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.compare.report import report

        return report(results, out)


def setting_for(options: Any) -> Setting:
    """The setting of a stream; with `quick`, three experiences of a few steps."""
    stream = STREAMS[options.stream]
    stream.check(options.stream, options.dataset_root)
    setting = Setting(options.stream, stream.experiences, STEPS.get(options.stream, 60), every=options.every)
    return replace(setting, experiences=2, steps=6, test_limit=100) if options.quick else setting


experiment = Compare()
