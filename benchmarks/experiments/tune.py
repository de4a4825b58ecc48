"""Strengths for the other experiments, chosen on seeds that they never report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments import ewc_hessian, trust_region
from benchmarks.experiments.refresh import experiment as refresh
from benchmarks.harness import Experiment, Options, one_of
from benchmarks.harness.experiment import Context, Record
from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
EWC_HESSIAN_GRIDS = {ewc_hessian.SQUARED: (10.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 100000.0)}
EWC_HESSIAN_GRID = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)  # decades, and thirds of them around the best
TRUST_REGION_GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
TRUST_REGION_EWC_GRID = (10.0, 100.0, 1000.0, 1e4, 1e5, 1e6, 1e7)
FIRST_SEED = 1000
TUNED: dict[type, tuple[Experiment, str]] = {
    refresh.Config: (refresh.experiment, "final/accumulate/all_accuracy"),
    ewc_hessian.Config: (ewc_hessian.experiment, "average_accuracy"),
    trust_region.Config: (trust_region.experiment, "average_accuracy"),
}
TARGETS = ("refresh", "ewc_hessian", "trust_region")


@dataclass(frozen=True)
class Config:
    """One strength of one method; `inner` is its configuration in the experiment that is tuned."""

    label: str
    method: str
    strength: float
    inner: Any


@dataclass(frozen=True)
class TuneOptions(Options):
    """`target` is the experiment to tune."""

    target: str = "refresh"


class Tune(Experiment):
    """Final average accuracy for each strength of each method, on seeds from 1000 on."""

    name = "tune"
    options_type = TuneOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--target", type=one_of("experiment", TARGETS), default="refresh")

    def variant(self, options: TuneOptions) -> str:
        return options.target

    def configs(self, options: TuneOptions) -> Sequence[Config]:
        makers = {"refresh": _refresh, "ewc_hessian": _ewc_hessian, "trust_region": _trust_region}
        return [
            Config(f"{name} at {strength:g}", name, strength, make(strength))
            for name, (grid, make) in makers[options.target](options).items()
            for strength in (grid[:1] if options.quick else grid)
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        experiment, name = TUNED[type(config.inner)]
        records = experiment.run(config.inner, FIRST_SEED + seed, context)
        return [{"metric": "accuracy", "value": r["value"]} for r in records if r["metric"] == name]

    def report(self, results: Results, out: Path) -> str:
        places = [label.rsplit(" at ", 1) for label in results.labels]
        strengths = sorted({float(strength) for _, strength in places})
        rows: list[list] = []
        for name in dict.fromkeys(name for name, _ in places):
            cells = {s: results.final("accuracy", f"{name} at {s:g}") for s in strengths}
            known = {s: cell.mean for s, cell in cells.items() if cell and cell.mean == cell.mean}
            rows.append([name, *cells.values(), f"{max(known, key=lambda s: known[s]):g}" if known else "–"])
        columns = [Column("method"), *(Column(f"λ = {s:g}") for s in strengths), Column("best λ")]
        return f"# Average accuracy by strength, seeds from {FIRST_SEED} on\n\n" + table(columns, rows)


Maker = tuple[Sequence[float], Callable[[float], Any]]
"""The strengths to try, and the configuration at one of them."""


def _refresh(options: TuneOptions) -> dict[str, Maker]:
    def maker(config: refresh.Config) -> Maker:
        return GRID, lambda strength: replace(config, strength=strength, every=33)  # step 99, the last, too

    return {c.label: maker(c) for c in refresh.experiment.configs(options) if c.policy is not None}


def _ewc_hessian(options: TuneOptions) -> dict[str, Maker]:
    """On ReLU networks the Hessian's diagonal is the Fisher's, and so is its best strength."""

    def maker(activation: str, name: str) -> Maker:
        setting = ewc_hessian.setting_for(activation, options)
        grid = EWC_HESSIAN_GRIDS.get(name, EWC_HESSIAN_GRID)
        return grid, lambda strength: ewc_hessian.penalised_config(activation, name, strength, setting)

    return {
        f"{activation}, {name}": maker(activation, name)
        for activation, name in ewc_hessian.STRENGTHS
        if (activation, name) != ("ReLU", "Hessian")
    }


def _trust_region(options: TuneOptions) -> dict[str, Maker]:
    from benchmarks.experiments.trust_region.grid import EWC, at_strength, penalised

    def maker(setting: trust_region.Setting, name: str) -> Maker:
        grid = TRUST_REGION_EWC_GRID if name == EWC else TRUST_REGION_GRID
        return grid, lambda strength: trust_region.Config(
            f"{setting.stream}, {name}", at_strength(setting, name, strength), setting
        )

    chosen = trust_region.TrustRegionOptions(options.seeds, options.quick, options.dataset_root)
    streams = trust_region.settings(chosen)
    return {f"{s.stream}, {name}": maker(s, name) for s in streams for name in penalised(s)}


experiment = Tune()
