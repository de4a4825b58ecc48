"""The rows: a path from Avalanche's setting to one that keeps ten tasks, a factor at a time, and the bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from avalanche_curv import (
    Accumulate,
    BatchedEmpiricalFisher,
    Curvature,
    Diagonal,
    Fisher,
    Kronecker,
    PiWeighted,
    Structure,
)
from benchmarks.experiments.ewc_permuted_mnist import FIRST_TUNING_SEED, ORIGINAL, TUNE, Adam, Config, Setting, Sgd
from benchmarks.experiments.projections.methods import Multitask
from benchmarks.methods import Ours, Plain
from benchmarks.mnist import DEVIATION, MEAN

VALIDATION = 0.1  # of the training images, in tuning
PART = 0.1  # of the examples of a task, on which its curvature is estimated
THEIRS = 2.0  # our strength where Avalanche's EWC has ewc_lambda = 1, since it leaves out the ½
KRONECKER = Kronecker(sums=PiWeighted())

SLOW = Setting(Sgd(1e-3), mean=MEAN, deviation=DEVIATION)
FAST = replace(SLOW, optimiser=Sgd(0.1))
UNSHIFTED = replace(FAST, mean=0.0, deviation=1.0)
ADAM = replace(UNSHIFTED, optimiser=Adam(1e-3))
NORMALISED = replace(FAST, optimiser=Adam(1e-3))
ORIGINALLY = replace(SLOW, hidden=1000, steps=2350, batch=256)  # ten epochs


@dataclass(frozen=True)
class Row:
    """A penalised row, with the strength that tuning chose and those it tried; none for a strength that is given."""

    label: str
    changed: str
    setting: Setting
    curvature: Curvature
    strength: float
    tried: tuple[float, ...] = ()
    structure: Structure = Diagonal()  # noqa: RUF009  a frozen value

    def at(self, strength: float, label: str, first_seed: int = 0) -> Config:
        """The row, or another one, at a strength."""
        method = Ours(strength, self.curvature, self.structure, Accumulate(fraction=PART))
        slowdown = 3.0 if isinstance(self.structure, Kronecker) else 1.2
        return Config(label, method, self.setting, self.changed, slowdown, first_seed)


BATCHES = BatchedEmpiricalFisher(batch_size=128)
DIAGONAL = Row("6 optimiser", "Adam at 0.001, λ tuned", ADAM, Fisher(), 30.0, (10.0, 30.0, 100.0))
PATH = (  # strengths: the best of `run ewc_permuted_mnist --part tune`
    Row("1 Avalanche's recipe", "", SLOW, BATCHES, THEIRS),
    Row("2 learning rate", "SGD at 0.1 instead of 0.001", FAST, BATCHES, THEIRS),
    Row("3 strength", "λ tuned", FAST, BATCHES, 300.0, (100.0, 300.0, 1000.0)),
    Row("4 per-example Fisher", "exact Fisher, λ tuned", FAST, Fisher(), 3.0, (1.0, 3.0, 10.0)),
    Row("5 pixels", "in [0, 1], λ tuned", UNSHIFTED, Fisher(), 3.0, (1.0, 3.0, 10.0)),
    DIAGONAL,
    Row("7 Kronecker", "KFAC for the diagonal, λ tuned", ADAM, Fisher(), 10.0, (3.0, 10.0, 30.0), KRONECKER),
)
AS_SIX = replace(DIAGONAL, tried=())
ASIDE = (
    Row("6 normalised", "row 6, pixels as in row 4, λ tuned", NORMALISED, Fisher(), 30.0, (10.0, 30.0, 100.0)),
    replace(AS_SIX, label="6 wide", changed="row 6, 1,000 units, at its λ", setting=replace(ADAM, hidden=1000)),
    replace(AS_SIX, label="6 long", changed="row 6, twice the steps, at its λ", setting=replace(ADAM, steps=1000)),
)


def rows(part: str) -> list[Config]:
    """The grid of a part."""
    if part == TUNE:
        return list(_tuned())
    if part == ORIGINAL:
        theirs = Ours(THEIRS, BatchedEmpiricalFisher(batch_size=256), Diagonal(), Accumulate())
        return [Config("Avalanche's setting", theirs, ORIGINALLY), Config("Naive in it", Plain(), ORIGINALLY)]
    return [
        Config("Naive, as row 1", Plain(), SLOW),
        *(row.at(row.strength, row.label) for row in (*PATH, *ASIDE)),
        Config("Naive, as row 7", Plain(), ADAM),
        Config("multitask, as row 7", Multitask(), ADAM),
    ]


def _tuned() -> Iterator[Config]:
    for row in (*PATH, *ASIDE):
        tuned = replace(row, setting=replace(row.setting, validation=VALIDATION))
        for strength in row.tried:
            yield tuned.at(strength, f"{row.label} at {strength:g}", FIRST_TUNING_SEED)
