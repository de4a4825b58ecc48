"""Strengths for the other experiments, and dampings, chosen on seeds that they never report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from benchmarks.experiments.ewc_hessian import experiment as ewc_hessian
from benchmarks.experiments.merging import experiment as merging
from benchmarks.experiments.refresh import experiment as refresh
from benchmarks.experiments.trust_region import experiment as trust_region
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.harness.options import one_of
from benchmarks.harness.tuning import FIRST_SEED


@dataclass(frozen=True)
class Target:
    """An experiment to tune: the metric that decides, the strengths to try for a row of its grid (none for a row that
    is not tuned), and the row at one of them."""

    experiment: Experiment
    metric: str
    tried: Callable[[Any], Sequence[float]]
    at: Callable[[Any, float], Any]


def _with_method(config: Any, strength: float) -> Any:
    return replace(config, method=config.method.with_strength(strength))


def _tried_of_matrix(config: ewc_hessian.Config) -> Sequence[float]:
    """Decades, and thirds of them around the best. On ReLU networks the Hessian's diagonal is the Fisher's, and so is
    its best strength."""
    row = (config.setting.activation, config.penalty)
    if row not in ewc_hessian.STRENGTHS or row == ("ReLU", "Hessian"):
        return ()
    squared = config.penalty == ewc_hessian.SQUARED
    return (10.0, 100.0, 300.0, 1000.0, 3000.0, 1e4, 1e5) if squared else (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


def _tried_of_refresh_per_task(config: trust_region.Config) -> Sequence[float]:
    if (config.setting.stream, config.name) not in trust_region.STRENGTHS:
        return ()
    is_avalanche = config.name == trust_region.EWC
    return (10.0, 100.0, 1000.0, 1e4, 1e5, 1e6, 1e7) if is_avalanche else (0.1, 1.0, 10.0, 100.0, 1000.0)


TARGETS = {
    "refresh": Target(
        refresh.experiment,
        "final/accumulate/all_accuracy",
        lambda config: () if config.policy is None else (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0),
        lambda config, strength: replace(config, strength=strength, every=33),  # step 99, the last, too
    ),
    "ewc_hessian": Target(ewc_hessian.experiment, "average_accuracy", _tried_of_matrix, _with_method),
    "trust_region": Target(trust_region.experiment, "average_accuracy", _tried_of_refresh_per_task, _with_method),
    "merging": Target(
        merging.experiment,
        "accuracy",
        lambda config: config.tried,
        lambda config, damping: replace(config, damping=damping, tried=()),
    ),
}


@dataclass(frozen=True)
class Config:
    """One strength of one method of the experiment `target`, whose configuration is `inner`."""

    target: str
    method: str
    strength: float
    inner: Any

    @property
    def label(self) -> str:
        return f"{self.method} at {self.strength:g}"


@dataclass(frozen=True)
class TuneOptions(Options):
    """Which experiment is tuned."""

    target: Annotated[str, one_of("experiment", TARGETS)] = "refresh"
    """the experiment to tune"""


class Tune(Experiment):
    """Final average accuracy for each strength of each method, on seeds from 1000 on."""

    name = "tune"
    options_type = TuneOptions

    def variant(self, options: TuneOptions) -> str:
        return options.target

    def configs(self, options: TuneOptions) -> Sequence[Config]:
        target = TARGETS[options.target]
        shared = target.experiment.options_type(options.seeds, options.quick, options.dataset_root)
        return [
            Config(options.target, inner.label, strength, target.at(inner, strength))
            for inner in target.experiment.configs(shared)
            for strength in target.tried(inner)[: 1 if options.quick else None]
        ]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        target = TARGETS[config.target]
        records = target.experiment.run(config.inner, FIRST_SEED + seed, context)
        return [{"metric": "accuracy", "value": r["value"]} for r in records if r["metric"] == target.metric]


experiment = Tune()
