"""Rows that differ in how sums of Kronecker factors are kept, and what a step with them costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from torch import nn

from avalanche_curv import (
    EKFAC,
    Accumulate,
    CurvatureEWCPlugin,
    Diagonal,
    Energy,
    Fisher,
    FrobeniusOptimal,
    KeepTerms,
    Kronecker,
    Merge,
    PartialTraces,
    PiWeighted,
)
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.harness import Record
from benchmarks.methods import Ours
from benchmarks.timing import clocked, interleaved
from benchmarks.training import Data, Trainer

STRENGTH = 10.0


def methods(fraction: float) -> dict[str, Ours]:
    """By label. Curvature is estimated on a `fraction` of each task; where the label does not say that all of it moves
    to the newest anchor, the slope of the past there is kept."""
    pair, cuts = PartialTraces(), {"80 %": Energy(0.8), "60 %": Energy(0.6)}
    accumulated = {
        "diagonal": Diagonal(),
        "list": Kronecker(),
        "one pair": Kronecker(pair),
        "EKFAC pair": EKFAC(pair),
        "list of 3": Kronecker(KeepTerms(most=3)),
        "list cut to 80 %": Kronecker(cut=Energy(0.8)),
        "one pair, Frobenius-optimal": Kronecker(FrobeniusOptimal()),
        "one pair, pi-weighted": Kronecker(PiWeighted()),
    }
    moved = {
        "one pair": Kronecker(pair),
        "one pair, Frobenius-optimal": Kronecker(FrobeniusOptimal()),
        "one pair, pi-weighted": Kronecker(PiWeighted()),
        "EKFAC pair": EKFAC(pair),
        **{f"one pair cut to {part}": Kronecker(pair, cut=cut) for part, cut in cuts.items()},
        **{f"EKFAC pair cut to {part}": EKFAC(pair, cut=cut) for part, cut in cuts.items()},
    }
    own, newest = Accumulate(fraction=fraction), Merge(fraction=fraction)
    kept = {label: Ours(STRENGTH, Fisher(), structure, own) for label, structure in accumulated.items()}
    return kept | {f"{label}, moved": Ours(STRENGTH, Fisher(), it, newest) for label, it in moved.items()}


def price(trainer: Trainer, data: Data, rounds: int = 30) -> Iterator[Record]:
    """Processor time of the penalty of all of the past in that of a plain step on `data`, and the bytes of the past;
    medians, in turn. Nothing where there is no past."""
    strategy = trainer.strategy
    found = [plugin for plugin in strategy.plugins if isinstance(plugin, CurvatureEWCPlugin)]
    if not found or found[0].past.model is None:
        return
    past, model = found[0].past.model, strategy.model.train()
    penalty, parameters = Penalty(past, found[0].strength), [p.detach() for p in model.parameters()]

    def step() -> None:
        strategy.optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        strategy.optimizer.step()

    work = {"step": step, "penalty": lambda: penalty.evaluate(parameters)}
    times = interleaved({name: clocked(one, time.process_time) for name, one in work.items()}, rounds)
    plain, added = (statistics.median(times[name]) for name in ("step", "penalty"))
    yield {"metric": "step", "value": 1 + added / plain}
    yield {"metric": "bytes", "value": past.nbytes}
