"""The comparison: each method at its strength."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.compare import tuning
from benchmarks.experiments.compare.report import report
from benchmarks.experiments.compare.setting import (
    DEFAULT_STREAM,
    EXPERIENCES,
    FIRST,
    PROTOCOLS,
    Setting,
    add_stream_arguments,
    setting_for,
    variant,
)
from benchmarks.harness import Experiment, Options, UsageError, one_of, positive
from benchmarks.harness.experiment import Context, Record
from benchmarks.strategies import STRATEGIES, chosen
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

BASELINE = "Naive"
TUNED = Path(__file__).with_name("strengths.json")  # what `run tune_compare` has found, by stream and scenario
ELSEWHERE = f"{DEFAULT_STREAM}/{STREAMS[DEFAULT_STREAM].scenarios[0]}"
HERE = "this stream"


@dataclass(frozen=True)
class Config:
    """One method in one setting; `tuned_on` says where its strength was chosen, if it has one."""

    label: str
    method: Method
    setting: Setting
    tuned_on: str | None = None


@dataclass(frozen=True)
class CompareOptions(Options):
    """What `add_arguments` says of each; None is what the stream has. `strengths` are what tuning has found."""

    stream: str = DEFAULT_STREAM
    scenario: str | None = None
    strategy: Sequence[str] | None = None
    steps: int | None = None
    every: int | None = None
    tune: str | None = None
    first: int | None = None
    tuning_seeds: int | None = None
    baseline: str = BASELINE
    strengths: Sequence[tuple[str, float]] = ()
    seeds: int = 2

    @property
    def strategies(self) -> list[str] | None:
        """The names that were asked for, and the baseline with them; None for all."""
        return None if self.strategy is None else list(dict.fromkeys([*self.strategy, self.baseline]))

    @property
    def tuning_options(self) -> tuning.TuningOptions:
        """The tuning that this asks for."""
        return tuning.TuningOptions(
            seeds=self.tuning_seeds or 1, quick=self.quick, dataset_root=self.dataset_root, stream=self.stream,
            scenario=self.scenario, strategy=self.strategies, steps=self.steps,
            protocol=self.tune or tuning.TuningOptions.protocol, first=self.first,
        )


class Compare(Experiment):
    """Average accuracy, forgetting, seconds and stored bytes of each method, with fidelity along each trajectory."""

    name = "compare"
    version = 2  # since Adam is fused and accuracy is that of `strategy.eval`
    options_type = CompareOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_stream_arguments(parser, "--tune first")
        parser.set_defaults(seeds=2, strengths=())  # two seeds, so that the first look takes minutes
        parser.add_argument("--every", type=positive, metavar="N", help="measure fidelity every N steps")
        parser.add_argument(
            "--tune", type=one_of("protocol", PROTOCOLS),
            help="choose each strength first, on validation parts with seeds from 1000 on: on the whole stream, or on "
            "its first experiences only (Chaudhry et al. 2019)",
        )
        parser.add_argument("--tuning-seeds", type=positive, metavar="N", help="for --tune (default 1)")
        parser.add_argument("--baseline", default=BASELINE, help="what differences are tested against (default Naive)")

    def variant(self, options: CompareOptions) -> str:
        count = options.first or EXPERIENCES if options.tune == FIRST else ""
        return variant(options, f"tuned-{options.tune}{count}" if options.tune else "")

    def prerequisite(self, options: CompareOptions) -> tuple[Experiment, Options] | None:
        configs = self.configs(options)  # what cannot be met is said before the tuning
        if not options.tune and (options.first or options.tuning_seeds):
            raise UsageError("--first and --tuning-seeds are for tuning: add --tune stream or --tune first.")
        tuned = options.tune and any(STRATEGIES[config.label].grid for config in configs)
        return (tuning.experiment, options.tuning_options) if tuned else None

    def settled(self, options: CompareOptions, results: Results) -> CompareOptions:
        return replace(options, strengths=tuple(tuning.best_strengths(results).items()))

    def configs(self, options: CompareOptions) -> Sequence[Config]:
        """A strength is that of `options.strengths`, else the one that was tuned before for this stream and scenario,
        else for the default stream."""
        setting = setting_for(options)
        chosen(setting.scenario, [options.baseline])
        place = f"{setting.stream}/{setting.scenario}"
        known: dict[str, dict[str, float]] = json.loads(TUNED.read_text(encoding="utf-8"))
        before = place if place in known else ELSEWHERE
        found = {name: (value, before) for name, value in known.get(before, {}).items()}
        found |= {name: (value, HERE) for name, value in options.strengths}
        made, methods = [], setting.methods()
        for name in chosen(setting.scenario, options.strategies):
            strength, source = found.get(name, (None, None)) if STRATEGIES[name].grid else (None, None)
            method = methods[name] if strength is None else methods[name].with_strength(strength)
            made.append(Config(name, method, setting, source))
        return made

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.compare.run import run

        return run(config.method, config.setting, seed, context)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


experiment = Compare()
