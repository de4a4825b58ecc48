"""Claims of 2026 on the importance of weights, under exact estimators, each with a strength of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Annotated

import torch

from avalanche_curv import BatchedEmpiricalFisher, Curvature, EmpiricalFisher, Fisher
from avalanche_curv.core import NonFiniteCurvatureError
from benchmarks.experiments.claims.course import ACCURACY, Pixels, PublicCode, Setting, at_once, learn, sequence
from benchmarks.experiments.claims.reversal import Reversed
from benchmarks.experiments.claims.uniform import Uniform
from benchmarks.experiments.claims.variational import Variational
from benchmarks.harness import Context, Record, Results
from benchmarks.harness.options import positive
from benchmarks.harness.tuning import FIRST_SEED, SelfTuned, TunedOptions, best
from benchmarks.strategies import decades
from benchmarks.streams.features import Features, Pretrained, RandomReLU
from benchmarks.streams.scenario import CLASS, DOMAIN, TASK

HELD_OUT = 100  # training images of each class, in tuning
BATCH = 100  # of the mini-batches whose gradients are squared
NAIVE, JOINT, ALL_OUTPUTS = "naive", "joint", "joint, over all outputs"
EXACT = "exact Fisher"

SETTINGS = {
    "pixels, shared outputs": Setting(Pixels(), DOMAIN),
    "pixels, one head": Setting(Pixels(), CLASS),
    "pixels, a head for each task": Setting(Pixels(), TASK, tasks=(6, 2, 2)),
    "features and adapter, shared outputs": Setting(Pretrained(), DOMAIN, hidden=(128,), rank=8),
}
KINDS: dict[str, Curvature] = {
    EXACT: Fisher(),
    "empirical Fisher": EmpiricalFisher(),
    "mini-batch squares": BatchedEmpiricalFisher(BATCH),
    "reversal": Reversed(EmpiricalFisher()),
    "reversal of mini-batches": Reversed(BatchedEmpiricalFisher(BATCH)),
    "variational": Variational(batch=BATCH),
    "uniform": Uniform(),
}
LOOKED_AT = tuple(KINDS)[:5]
WHOLE, OF_WHOLE = (EXACT, "mini-batch squares", "reversal"), ", of W + B A"
PUBLIC = {  # the kinds and strengths of the public code of EWC-DR, for EWC and for its own method
    "public EWC": ("mini-batch squares", 1e3),
    "public EWC-DR": ("reversal of mini-batches", 1e4),
}
TUNED = ", tuned"
GRIDS = {
    EXACT: decades(0, 10),
    "empirical Fisher": decades(1, 13),
    "mini-batch squares": decades(2, 14),
    "reversal": decades(-2, 11),
    "reversal of mini-batches": decades(-1, 9),
    "variational": decades(-2, 10),
    "uniform": decades(-3, 5),
    "public EWC": decades(1, 14),
    "public EWC-DR": decades(0, 8),
}
"""The strengths that are tried for a kind, or for a row of the public code."""


@dataclass(frozen=True)
class Config:
    """One row of a setting; without `kind` nothing is kept. `chosen` are the measures for which this strength is shown:
    those by which it was chosen, or all. `whole`: the curvature is that of W + B A."""

    label: str
    row: str
    part: str
    setting: Setting
    chosen: tuple[str, ...]
    kind: Curvature | None = None
    strength: float = 0.0
    code: PublicCode | None = None
    whole: bool = False

    @property
    def grid(self) -> tuple[float, ...]:
        """The strengths to try; none for a row that is not tuned."""
        own = self.code is not None and not self.row.endswith(TUNED)
        return () if own else GRIDS.get(self.row.removesuffix(OF_WHOLE).removesuffix(TUNED), ())


@dataclass(frozen=True)
class ClaimsOptions(TunedOptions):
    """Five seeds unless asked for others."""

    seeds: Annotated[int, positive()] = 5
    """run seeds 0 to SEEDS - 1"""


class Claims(SelfTuned):
    """Accuracy at the end of five tasks for each kind of importance.

    First each strength is tried with seed 1000, on images held out of training; the strength of the best accuracy,
    among equal ones the smallest, is the one of the report: chosen for each row and each measure.
    """

    name = "claims"
    options_type = ClaimsOptions

    def settled(self, options: ClaimsOptions, results: Results) -> ClaimsOptions:
        return replace(options, strengths=best_strengths(results))

    def configs(self, options: ClaimsOptions) -> Sequence[Config]:
        """Raises UsageError where images or the package of the features are missing."""
        made: list[Config] = []
        for part, setting in SETTINGS.items():
            if options.quick:
                seen = setting.map if isinstance(setting.map, Pixels) else RandomReLU(32)
                setting = replace(setting, map=seen, hidden=(16,), images="digits", train=60, test=20, steps=10)
            Features(setting.images, setting.map, setting.train, setting.test).ready(options.dataset_root)
            made += rows(part, setting, KINDS | ({"variational": Variational(steps=5)} if options.quick else {}))
        if options.tuning:
            tried, held = slice(1 if options.quick else None), 20 if options.quick else HELD_OUT
            return [
                replace(at(one, strength), setting=replace(one.setting, held_out=held))
                for one in made for strength in one.grid[tried]
            ]  # fmt: skip
        return [found for one in made for found in chosen(one, options.strengths)]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        seed += FIRST_SEED if config.setting.held_out else 0
        tasks, tests = sequence(config.setting, seed, context.dataset_root)
        torch.manual_seed(seed)
        if config.row in (JOINT, ALL_OUTPUTS):
            yield from at_once(config.setting, tasks, tests, every=config.row == ALL_OUTPUTS)
            return
        try:
            yield from learn(
                config.setting, tasks, tests, kind=config.kind, strength=config.strength, code=config.code,
                whole=config.whole, kinds={name: KINDS[name] for name in LOOKED_AT} if config.row == NAIVE else {},
            )  # fmt: skip
        except NonFiniteCurvatureError:
            yield from ({"metric": measure, "value": nan} for measure in ACCURACY[config.setting.scenario])


def rows(part: str, setting: Setting, kinds: Mapping[str, Curvature]) -> list[Config]:
    """All rows of a setting, each with the first strength of its grid."""
    asked, heads = ACCURACY[setting.scenario], setting.scenario == TASK

    def row(name: str, **options: object) -> Config:
        return Config(f"{part}, {name}", name, part, setting, asked, **options)  # type: ignore[arg-type]

    made = [row(NAIVE), row(JOINT), *([row(ALL_OUTPUTS)] if heads else [])]
    made += [row(name, kind=kind) for name, kind in kinds.items()]
    if setting.rank is not None:
        return made + [row(name + OF_WHOLE, kind=kinds[name], whole=True) for name in WHOLE]
    if heads:
        for name, (kind, strength) in PUBLIC.items():
            made.append(row(name, kind=kinds[kind], strength=strength, code=PublicCode()))
            made.append(row(name + TUNED, kind=kinds[kind], code=PublicCode()))
    return made


def at(config: Config, strength: float) -> Config:
    """The row with a strength."""
    return replace(config, strength=strength, label=f"{config.label} at {strength:g}")


def chosen(config: Config, strengths: Sequence[tuple[str, str, str, float]]) -> list[Config]:
    """The row with each strength that was chosen for one of its measures, or with its own."""
    if not config.grid:
        return [config]
    own = [(measure, found) for part, row, measure, found in strengths if (part, row) == (config.part, config.row)]
    return [
        replace(at(config, strength), chosen=tuple(measure for measure, found in own if found == strength))
        for strength in sorted({found for _, found in own})
    ]


def best_strengths(results: Results) -> tuple[tuple[str, str, str, float], ...]:
    """By part, row and measure: the strength of the best accuracy, among equal ones the smallest."""
    found = best(
        ((row["part"], row["row"], measure), row["strength"], one.final(measure))
        for one in results.each() for row in [one.first] for measure in row["chosen"]
    )  # fmt: skip
    return tuple((*place, strength) for place, strength in found.items())


experiment = Claims()
