"""Accuracy and forgetting of the strategies of this package and of Avalanche, on one stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.experiments.compare.setting import (
    DEFAULT_STREAM,
    EXPERIENCES,
    FIRST,
    PROTOCOLS,
    Config,
    StreamOptions,
)
from benchmarks.experiments.tune_compare.experiment import TuningOptions, best_strengths
from benchmarks.experiments.tune_compare.experiment import experiment as tuning
from benchmarks.harness import Context, Experiment, Options, Record, Results, UsageError
from benchmarks.harness.errors import unknown
from benchmarks.harness.options import one_of, positive
from benchmarks.strategies import SHOWN, STRATEGIES, chosen
from benchmarks.streams import STREAMS

TUNED = Path(__file__).with_name("strengths.json")  # what `run tune_compare` has found, by stream and scenario
ELSEWHERE = f"{DEFAULT_STREAM}/{STREAMS[DEFAULT_STREAM].scenarios[0]}"
HERE = "this stream"


@dataclass(frozen=True)
class CompareOptions(StreamOptions):
    """Five seeds of the strategies that matter unless asked for others: enough to test differences, within minutes."""

    every: Annotated[int | None, positive()] = None
    """measure fidelity every N steps"""
    tune: Annotated[str | None, one_of("protocol", PROTOCOLS)] = None
    """choose each strength first, on validation parts with seeds from 1000 on: on the whole stream, or on its first
    experiences only (Chaudhry et al. 2019)"""
    tuning_seeds: Annotated[int | None, positive()] = None
    """for --tune; default: 1"""
    baseline: str = "Naive"
    """what differences are tested against"""
    strengths: Annotated[tuple[tuple[str, float], ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """what tuning has found; no option of the command line"""

    @property
    def strategies(self) -> tuple[str, ...]:
        """The names of those that run, the baseline among them. Raises UsageError as `chosen` does, and for a baseline
        that is not one full name."""
        if self.baseline not in STRATEGIES:
            raise UsageError(unknown("strategy", self.baseline, STRATEGIES))
        names = chosen(self.its_scenario, self.strategy)
        return tuple(dict.fromkeys([*names, *chosen(self.its_scenario, [self.baseline])]))


class Compare(Experiment):
    """Average accuracy, forgetting, seconds and stored bytes of each method, with fidelity along each trajectory."""

    name = "compare"
    shown = SHOWN
    version = 2  # since Adam is fused and accuracy is that of `strategy.eval`
    options_type = CompareOptions

    def variant(self, options: CompareOptions) -> str:
        count = options.first or EXPERIENCES if options.tune == FIRST else ""
        return options.variant(f"tuned-{options.tune}{count}" if options.tune else "")

    def check(self, options: CompareOptions) -> None:
        _ = options.strategies, options.setting(options.every)
        if not options.tune and (options.first or options.tuning_seeds):
            raise UsageError("--first and --tuning-seeds are for tuning: add --tune stream or --tune first.")

    def prerequisite(self, options: CompareOptions) -> tuple[Experiment, Options] | None:
        self.check(options)  # what cannot be met is said before the tuning
        if not options.tune or not any(STRATEGIES[name].grid for name in options.strategies):
            return None
        return tuning, TuningOptions(
            seeds=options.tuning_seeds or 1, quick=options.quick, dataset_root=options.dataset_root,
            stream=options.stream, scenario=options.scenario, strategy=options.strategies, steps=options.steps,
            protocol=options.tune, first=options.first,
        )  # fmt: skip

    def settled(self, options: CompareOptions, results: Results) -> CompareOptions:
        return replace(options, strengths=tuple(best_strengths(results).items()))

    def configs(self, options: CompareOptions) -> Sequence[Config]:
        """A strength is that of `options.strengths`, else the one that was tuned before for this stream and scenario,
        else for the default stream."""
        from benchmarks.methods import methods  # needs torch

        setting = options.setting(options.every)
        place = f"{setting.stream}/{setting.scenario}"
        known: dict[str, dict[str, float]] = json.loads(TUNED.read_text(encoding="utf-8"))
        before = place if place in known else ELSEWHERE
        found = {name: (value, before) for name, value in known.get(before, {}).items()}
        found |= {name: (value, HERE) for name, value in options.strengths}
        made, by_name = [], methods(setting.memory)
        for name in options.strategies:
            method, source = by_name[name], None
            if name in found and STRATEGIES[name].grid:
                strength, source = found[name]
                method = method.with_strength(strength)
            made.append(Config(name, name, method, setting, source))
        return made

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.compare.run import run  # needs torch and Avalanche

        return run(config.method, config.setting, seed, context)


experiment = Compare()
