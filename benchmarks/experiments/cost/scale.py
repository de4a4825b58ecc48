"""How the price of the past grows with the number of parameters and of tasks: absorbing a task, a training step, and
the bytes held, for each way to keep the past."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from avalanche_curv import (
    EKFAC,
    Accumulate,
    BlockDiagonal,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    EmpiricalRisk,
    FlatSpectrum,
    InputSpace,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    Past,
    PerLayer,
    Projector,
    ProtectedSpace,
    Protection,
    Rank,
    StepProjection,
    Structure,
)
from avalanche_curv.core.structures.kronecker import Factorised
from avalanche_curv.core.structures.memory import human_bytes
from benchmarks.experiments.cost.models import MLP
from benchmarks.harness import Record
from benchmarks.harness.unit_run import PeakMemory
from benchmarks.timing import Pair, clocked, gradient_passes, perturb

HIDDEN = (20, 68, 221, 704, 2233, 7068)  # 1e3, 1e4, ..., 1e8 parameters, with as many inputs as units
COUNTS = (1, 3, 10, 30, 100)
STRENGTH = 1e-6  # a penalty of any strength costs the same, and this one moves nothing
ITEMSIZE = 4
MOST_BYTES = 10 * 2**30  # of a unit
MATRICES, VECTORS = 2, 8  # that an absorb holds: what is held and its sum; models, gradients, anchors
MOST_SECONDS = 40  # that an absorb and a step may take, as foreseen
LONG = 5  # seconds of a round that is not repeated
PRODUCTS, DECOMPOSITIONS = 5e10, 2e10  # operations a second of one core, in float32 and in float64
Foresight = tuple[int, float]
"""Bytes of what is held of one task, and the seconds of its decompositions and of one product."""


class Keeping(ABC):
    """A way to keep the past: what is held grows from `empty` with each task."""

    @property
    @abstractmethod
    def empty(self) -> Any:
        """What is held before the first task."""

    @abstractmethod
    def foreseen(self, space: ParameterSpace) -> Foresight:
        """What one task of a model with these parameters will take."""

    @abstractmethod
    def absorb(self, held: Any, risk: EmpiricalRisk) -> Any:
        """What is held with one more task."""

    @abstractmethod
    def nbytes(self, held: Any) -> int:
        """Bytes of what is held."""

    @abstractmethod
    def attach(self, held: Any, optimizer: Optimizer, model: nn.Module) -> None:
        """Makes each step of the optimiser take the past into account."""


@dataclass(frozen=True)
class Penalised(Keeping):
    """The penalty of a sum of empirical Fishers in a structure, each at its own anchor."""

    structure: Structure

    @property
    def empty(self) -> Past:
        return Past()

    def foreseen(self, space: ParameterSpace) -> Foresight:
        structure, seconds = self.structure, 0.0
        if isinstance(structure, Factorised):
            seconds = structure.cost(space) / PRODUCTS
            if structure.cut is not None or structure.corrections:
                sides = [(shape[0], shape[1] + 1) for shape in space.shapes if len(shape) == 2]
                seconds += 10 * sum(out**3 + inputs**3 for out, inputs in sides) / DECOMPOSITIONS
        return structure.bytes(space, ITEMSIZE), seconds

    def absorb(self, held: Past, risk: EmpiricalRisk) -> Past:
        return Accumulate().absorb(held, risk, EmpiricalFisher(), self.structure)

    def nbytes(self, held: Past) -> int:
        return 0 if held.model is None else held.model.nbytes

    def attach(self, held: Past, optimizer: Optimizer, model: nn.Module) -> None:
        options: dict[str, Any] = {"curvature": EmpiricalFisher(), "structure": self.structure}
        CurvatureRegularizer(STRENGTH, guard=None, past=held, **options).attach(optimizer, model)


@dataclass(frozen=True)
class Projected(Keeping):
    """Steps outside of what a protection says that past tasks need."""

    protection: Protection

    @property
    def empty(self) -> ProtectedSpace:
        return ProtectedSpace()

    def foreseen(self, space: ParameterSpace) -> Foresight:
        bounds = self.protection.bounds(space).values()
        return sum(ITEMSIZE * bound.dimension * bound.most for bound in bounds), 0.0

    def absorb(self, held: ProtectedSpace, risk: EmpiricalRisk) -> ProtectedSpace:
        return held.absorb(risk, self.protection)

    def nbytes(self, held: ProtectedSpace) -> int:
        return held.nbytes

    def attach(self, held: ProtectedSpace, optimizer: Optimizer, model: nn.Module) -> None:
        projector = Projector(held, StepProjection())
        optimizer.register_step_pre_hook(lambda *_: projector.before_step(model))
        optimizer.register_step_post_hook(lambda *_: projector.after_step(model))


@dataclass(frozen=True)
class Scaling:
    """One way to keep the past. `sizes` are those of the networks hidden-hidden-hidden-10 on which two tasks of
    `examples` are absorbed; on that of `hidden` so many tiny tasks as `counts` says, of `few` examples. Each number is
    a median over as many rounds as fit into `seconds`, of processor time."""

    label: str
    keeping: Keeping
    sizes: tuple[int, ...] = HIDDEN
    examples: int = 64
    counts: tuple[int, ...] = COUNTS
    hidden: int = HIDDEN[2]
    few: int = 16
    seconds: float = 1.0

    def quick(self) -> Scaling:
        """Two small networks and three tasks."""
        return replace(self, sizes=(8, HIDDEN[0]), examples=16, counts=(1, 3), hidden=HIDDEN[0], seconds=0.02)


def scalings() -> list[Scaling]:
    """One configuration for each way; those whose matrices do not fit have their tasks on a smaller network."""
    top, ten = LowRank(Rank(10)), Rank(10)
    kept: dict[str, Structure] = {
        "diagonal": Diagonal(),
        "dense": Dense(),
        "dense for each parameter": BlockDiagonal(),
        "top 10 of each layer": BlockDiagonal(PerLayer(), top),
        "Kronecker, list": Kronecker(KeepTerms()),
        "Kronecker, one pair": Kronecker(),
        "Kronecker, one pair cut to 20": Kronecker(cut=Rank(20)),
        "EKFAC, list": EKFAC(KeepTerms()),
        "EKFAC, one pair": EKFAC(),
        "top 10": top,
        "top 10, 20 in all": LowRank(Rank(10), max_rank=20),
        "top 10 flat": FlatSpectrum(top),
        "matrix-free": MatrixFree(),
    }
    projected = {
        "projection, 10 directions": Eigenspace(EmpiricalFisher(), ten),
        "projection, 10 inputs of each layer": InputSpace(ten),
    }
    ways: dict[str, Keeping] = {name: Penalised(structure) for name, structure in kept.items()}
    ways |= {name: Projected(protection) for name, protection in projected.items()}
    return [Scaling(name, way, hidden=HIDDEN[0 if "dense" in name else 2]) for name, way in ways.items()]


def scaled(config: Scaling) -> Iterator[Record]:
    """Records with the number of parameters (``size/...``) or of tasks (``tasks/...``) as their step."""
    for hidden in config.sizes:
        yield from of_size(config, hidden)
    yield from of_tasks(config)


def of_size(config: Scaling, hidden: int) -> Iterator[Record]:
    """The second task, a step with the first, and their bytes; only what is foreseen where that is too much."""
    with torch.device("meta"):
        space = ParameterSpace.of(MLP(hidden, hidden).build())
    size, seconds = config.keeping.foreseen(space)
    at: dict[str, Any] = {"step": space.size}
    yield {"metric": "size/foreseen", "value": size, **at}
    if MATRICES * size + VECTORS * ITEMSIZE * space.size > MOST_BYTES:
        yield {"metric": "size/left_out", "value": 1.0, "reason": human_bytes(size), **at}
        return
    if seconds > MOST_SECONDS:
        yield {"metric": "size/left_out", "value": 1.0, "reason": f"{seconds:,.0f} s", **at}
        return
    past = _Growing(config, hidden, config.examples)
    past.grow()
    yield from ({**record, **at} for record in past.priced("size"))


def of_tasks(config: Scaling) -> Iterator[Record]:
    """The last of so many tasks, a step with all of them, and their bytes."""
    past, done = _Growing(config, config.hidden, config.few), 0
    for count in config.counts:
        for _ in range(count - done):
            past.grow()
        done = count
        yield from ({**record, "step": count} for record in past.priced("tasks"))


class _Growing:
    """A past that takes in one task after another, of a model that moves on between two."""

    def __init__(self, config: Scaling, hidden: int, examples: int) -> None:
        self.config, self.keeping, self.family, self.examples = config, config.keeping, MLP(hidden, hidden), examples
        self.model, self.held, self.count = self.family.build(), self.keeping.empty, 0
        self._begin()

    def _begin(self) -> None:
        """The examples of the next task."""
        self.batches = [self.family.examples(self.examples, seed=self.count)]

    def grow(self) -> None:
        """Takes in a task."""
        self.held = self.absorbed()
        perturb(self.model, self.count)
        self.count += 1
        self._begin()

    def absorbed(self) -> Any:
        """What would be held with one more task."""
        return self.keeping.absorb(self.held, EmpiricalRisk.snapshot(self.model, nn.CrossEntropyLoss(), self.batches))

    def priced(self, axis: str) -> Iterator[Record]:
        """Seconds of one more task and in passes of its gradient, the memory above that of before at its peak, seconds
        of a step and in those of a plain one, and bytes."""
        clock = partial(clocked, clock=time.process_time)
        begin = psutil.Process().memory_info().rss
        with PeakMemory() as memory:
            ratio, seconds = self._paired((clock(gradient_passes(self.model, self.batches)), clock(self.absorbed)))
        yield {"metric": f"{axis}/absorb_seconds", "value": seconds}
        yield {"metric": f"{axis}/absorb_passes", "value": ratio, "timing": True}
        yield {"metric": f"{axis}/peak", "value": max(0, memory.peak - begin), "timing": True}
        plain, with_past = (torch.optim.SGD(self.model.parameters(), lr=1e-6) for _ in range(2))
        self.keeping.attach(self.held, with_past, self.model)
        ratio, seconds = self._paired((clock(partial(self._step, plain)), clock(partial(self._step, with_past))))
        yield {"metric": f"{axis}/step_seconds", "value": seconds}
        yield {"metric": f"{axis}/step_ratio", "value": ratio, "timing": True}
        yield {"metric": f"{axis}/bytes", "value": self.keeping.nbytes(self.held)}

    def _step(self, optimizer: Optimizer) -> None:
        ((inputs, targets),) = self.batches
        optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), targets).backward()
        optimizer.step()

    def _paired(self, pair: Pair) -> tuple[float, float]:
        """Of a reference and a work, in turn: the median of their ratios, and that of the work's seconds. The first
        round counts only where it is too long for another."""
        rounds, begin = [tuple(timed() for timed in pair)], time.perf_counter()
        while (len(rounds) == 1 and sum(rounds[0]) < LONG) or time.perf_counter() - begin < self.config.seconds:
            rounds.append(tuple(timed() for timed in pair))
        rounds = rounds[1:] or rounds
        return statistics.median(work / base for base, work in rounds), statistics.median(work for _, work in rounds)
