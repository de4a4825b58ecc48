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
    Energy,
    Fisher,
    FrobeniusOptimal,
    KeepTerms,
    Kronecker,
    Merge,
    PiWeighted,
    Rank,
)
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.harness import Record
from benchmarks.methods import Ours
from benchmarks.timing import clocked, interleaved
from benchmarks.training import Data, Trainer

TRIED = (3.0, 10.0, 30.0)


def methods(fraction: float) -> dict[str, Ours]:
    """By label. Curvature is estimated on a `fraction` of each task; where the label does not say that all of it moves
    to the newest anchor, each quadratic keeps its own anchor, or their sum its slope at the newest one."""
    own, newest = Accumulate(fraction=fraction), Merge(fraction=fraction)
    return {
        label: Ours(strength, Fisher(), structure, policy)
        for label, strength, structure, policy in (
            ("list", 10.0, Kronecker(KeepTerms()), own),
            ("one pair", 10.0, Kronecker(), own),
            ("one pair, moved", 10.0, Kronecker(), newest),
            ("one pair, Frobenius-optimal, moved", 10.0, Kronecker(FrobeniusOptimal()), newest),
            ("one pair, pi-weighted, moved", 10.0, Kronecker(PiWeighted()), newest),
            ("one pair cut to 80 %, moved", 10.0, Kronecker(cut=Energy(0.8)), newest),
            ("one pair cut to 60 %, moved", 10.0, Kronecker(cut=Energy(0.6)), newest),
            ("one pair cut to 48 eigenvectors, moved", 10.0, Kronecker(cut=Rank(48)), newest),
            ("EKFAC pair cut to 80 %, moved", 10.0, EKFAC(cut=Energy(0.8)), newest),
        )
    }


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

    work = {"step": step, "penalty": lambda: penalty.last(penalty.gradients(parameters))}
    times = interleaved({name: clocked(one, time.process_time) for name, one in work.items()}, rounds)
    plain, added = (statistics.median(times[name]) for name in ("step", "penalty"))
    yield {"metric": "step", "value": 1 + added / plain}
    yield {"metric": "bytes", "value": past.nbytes}
