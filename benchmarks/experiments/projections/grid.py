"""The rows: the family of gradient projection memory, what penalises or replays instead, and the bounds."""

from __future__ import annotations

from dataclasses import replace

from avalanche_curv import (
    Accumulate,
    Diagonal,
    Eigenspace,
    Energy,
    Fisher,
    GradientProjection,
    InputSpace,
    OutputGradient,
    PerLayer,
    Projection,
    Rank,
    StepProjection,
)
from benchmarks.experiments.projections import MAIN, TUNE, WIDE, Config, Setting
from benchmarks.experiments.projections.methods import Multitask
from benchmarks.methods import AvalancheEWC, Method, Ours, Plain, Projected, Rehearsal

NAIVE, MULTITASK, GPM = "Naive", "multitask", "GPM"
EWC, CURVATURE_EWC = "Avalanche's EWC", "CurvatureEWC"
GRADIENT, STEP = "GPM, momentum, gradient", "GPM, momentum, step"
REPLAYED = 1000  # examples in the memory of replay
MOMENTUM = 0.9
PIXELS = 784
RANK = {MAIN: 20, WIDE: 100, TUNE: 20}
STRENGTHS = {EWC: 30.0, CURVATURE_EWC: 3.0}  # `run projections --part tune --tasks 5 --epochs 1`
GRIDS = {EWC: (10.0, 30.0, 100.0, 300.0, 1000.0), CURVATURE_EWC: (1.0, 3.0, 10.0, 30.0, 100.0)}
FIRST_TUNING_SEED = 1000


def rows(setting: Setting, part: str, rank: int | None) -> list[Config]:
    """The grid of a part."""
    if part == TUNE:
        return [
            Config(f"{name} at {strength:g}", penalised(name, strength), setting, first_seed=FIRST_TUNING_SEED)
            for name, grid in GRIDS.items() for strength in grid
        ]
    k = RANK[part] if rank is None else rank
    read = 0.7 + 0.03 * k * (setting.tasks - 1) / 2  # milliseconds: a flat basis is read twice in a step
    references = [Config(NAIVE, Plain(), setting), Config(GPM, gpm(), setting, 2.5)]
    flat = [
        Config(f"eigenspace, flat, {k}", Projected(Eigenspace(Fisher(), Rank(k))), setting, read),
        Config(f"eigenspace, per layer, {k}", Projected(Eigenspace(Fisher(), Rank(k), PerLayer())), setting, read),
        Config(f"OGD, {k}", Projected(Eigenspace(OutputGradient(), Rank(k), examples=k)), setting, read),
    ]
    if part == WIDE:
        return [*references, *flat]
    moving = replace(setting, momentum=MOMENTUM, rate=setting.rate * (1 - MOMENTUM))
    return [
        *references,
        *flat,
        *(Config(name, penalised(name, strength), setting, 1.0) for name, strength in STRENGTHS.items()),
        Config(f"replay, {REPLAYED}", Rehearsal(REPLAYED / (setting.tasks * setting.examples)), setting, 1.4),
        Config(GRADIENT, gpm(GradientProjection()), moving, 2.5),
        Config(STEP, gpm(), moving, 2.5),
        Config(MULTITASK, Multitask(), setting),
    ]


def gpm(projection: Projection = StepProjection()) -> Projected:  # noqa: B008  a frozen value
    """Gradient projection memory with the paper's thresholds, 0.95 for the first layer and 0.99 for the others, and 300
    examples of each task."""
    return Projected(InputSpace((Energy(0.95, PIXELS), Energy(0.99, PIXELS)), examples=300), projection)


def penalised(name: str, strength: float) -> Method:
    """A kind of elastic weight consolidation at a strength."""
    if name == EWC:
        return AvalancheEWC(strength)
    return Ours(strength, Fisher(), Diagonal(), Accumulate())
