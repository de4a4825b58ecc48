"""What leaks back into a protected subspace: sequential against one basis, gradient against step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import Tensor, nn

from avalanche_curv import (
    Eigenspace,
    Fisher,
    GradientProjection,
    OrthogonalProjectionPlugin,
    PermutedDigits,
    Projection,
    Rank,
    SequentialProjection,
    StepProjection,
)
from avalanche_curv.core.projection.blocks import ProtectedBlock
from avalanche_curv.core.projection.subspace import Subspace
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.networks import mlp
from benchmarks.training import Steps

Values = dict[str, torch.Tensor]
EVERY = 10
COSINES = (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
TASKS = (2, 3, 5, 10, 20)
QUICK = ("SGD", "momentum, stale")
PROJECTIONS = {"step": StepProjection(), "gradient": GradientProjection(), "sequential": SequentialProjection()}
RANDOM, TRAINED = "random steps", "training"


class ClipValues(SupervisedPlugin):
    """Clips each entry of the gradient to ±0.01."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_value_(strategy.model.parameters(), 0.01)


class ClipNorm(SupervisedPlugin):
    """Clips the norm of the gradient to 0.1."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.1)


class FreshState(SupervisedPlugin):
    """Clears the optimiser's state as an experience begins."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        strategy.optimizer.state.clear()


@dataclass(frozen=True)
class Optimiser:
    """A class of torch.optim with its options; `plugin` acts after the projection plugin."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    plugin: type[SupervisedPlugin] | None = None


SGD, MOMENTUM, ADAM = {"lr": 0.1}, {"lr": 0.02, "momentum": 0.9}, {"lr": 1e-3}
OPTIMISERS = {
    "SGD": Optimiser(torch.optim.SGD, SGD),
    "SGD, norm clipped": Optimiser(torch.optim.SGD, SGD, ClipNorm),
    "SGD, values clipped": Optimiser(torch.optim.SGD, SGD, ClipValues),
    "SGD, weight decay": Optimiser(torch.optim.SGD, {**SGD, "weight_decay": 1e-3}),
    "momentum, fresh": Optimiser(torch.optim.SGD, MOMENTUM, FreshState),
    "momentum, stale": Optimiser(torch.optim.SGD, MOMENTUM),
    "Adam, fresh": Optimiser(torch.optim.Adam, ADAM, FreshState),
    "Adam": Optimiser(torch.optim.Adam, ADAM),
    "AdamW": Optimiser(torch.optim.AdamW, {**ADAM, "weight_decay": 1e-2}),
    "RMSprop": Optimiser(torch.optim.RMSprop, ADAM),
}


@dataclass(frozen=True)
class Subspaces:
    """Subspaces of `rank` dimensions in R^`dimension`, of which any two are at principal angles of one cosine."""

    label: str
    cosine: float
    tasks: tuple[int, ...] = TASKS
    dimension: int = 500
    rank: int = 10
    draws: int = 1000
    part: str = RANDOM


@dataclass(frozen=True)
class Training:
    """An optimiser, by its name in the table, and what of it is projected, on permuted digits."""

    label: str
    name: str
    optimiser: Optimiser
    projection: Projection
    tasks: int = 3
    steps: int = 200
    batch: int = 32
    rank: int = 20
    examples: int = 100
    part: str = TRAINED

    @property
    def cost(self) -> float:
        return 10.0


class Leakage(Experiment):
    """‖U Δ‖ / ‖Δ‖ of random steps, and of what a network has moved in training."""

    name = "leakage"

    def configs(self, options: Options) -> Sequence[Subspaces | Training]:
        random = [Subspaces(f"cosine {c:g}", c, TASKS[:2] if options.quick else TASKS) for c in COSINES]
        size: dict[str, Any] = {"steps": 10} if options.quick else {}
        trained = [
            Training(f"{name}, {kind}", name, OPTIMISERS[name], projection, **size)
            for name in (QUICK if options.quick else OPTIMISERS)
            for kind, projection in PROJECTIONS.items()
        ]
        return [*random, *trained]

    def run(self, config: Subspaces | Training, seed: int, context: Context) -> Sequence[Record]:
        return list(drawn(config, seed)) if isinstance(config, Subspaces) else trained(config, seed)


def drawn(config: Subspaces, seed: int) -> Iterator[Record]:
    """The leakage of random steps into the first task's subspace and into the union, over so many tasks: from which one
    basis is projected out, or one subspace after another."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(config.draws, config.dimension, generator=generator, dtype=torch.float64)
    for tasks in config.tasks:
        frames = equiangular(tasks, config.rank, config.dimension, config.cosine, generator)
        union = _span(torch.cat(frames))
        held = merged(frames)
        yield {"metric": "used", "value": held.rank, "step": tasks}
        given = steps.float()
        for method in ("global", "sequential"):
            left = held.withdraw(given.clone(), given, by_task=method == "sequential").double()
            yield {"metric": f"{method}/first", "value": leakage(left, frames[0]), "step": tasks}
            yield {"metric": f"{method}/union", "value": leakage(left, union), "step": tasks}
        closed = expected(config.cosine, tasks, config.rank, config.dimension)
        yield {"metric": "expected/first", "value": closed.first, "step": tasks}
        yield {"metric": "expected/union", "value": closed.union, "step": tasks}


@dataclass(frozen=True)
class Leak:
    """√(E‖V Δ‖² / E‖Δ‖²) of a step, with V the subspace of the first task, and that of all tasks together."""

    first: float
    union: float


def expected(cosine: float, tasks: int, rank: int, dimension: int) -> Leak:
    """Of a step g ~ N(0, I) from which V₁, then V₂, … have been projected out, where V_i V_jᵀ = cosine · I.

    The steps left in a plane are those of k = `rank` copies of unit vectors v_i with the Gram matrix G. With
    b_i = v_i · g ~ N(0, G), the projections take away Σ_i v_i a_i, L a = b, where L is the lower triangle of G with its
    diagonal (they are one sweep of Gauss-Seidel), and leave v_i · Δ = r_i, r = (I − G L⁻¹) b. For two tasks

        E‖V₁ Δ‖² = k c² (1 − c²),  E‖U Δ‖² = k c²,  E‖Δ‖² = k c² + d − 2k.

    Nothing leaks where subspaces are orthogonal, nor where they are the same.

    >>> leak = expected(0.6, tasks=2, rank=1, dimension=3)
    >>> round(leak.first**2 * (0.36 + 1), 4), round(leak.union**2 * (0.36 + 1), 4)        # 0.36 · 0.64, 0.36
    (0.2304, 0.36)
    """
    gram = np.full((tasks, tasks), cosine) + (1 - cosine) * np.eye(tasks)
    left = np.eye(tasks) - gram @ np.linalg.inv(np.tril(gram))
    moments = left @ gram @ left.T
    inside = float(np.trace(np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ moments))
    total = rank * inside + dimension - rank * tasks  # more where all are the same, but then nothing leaks
    return Leak(math.sqrt(rank * max(0.0, moments[0, 0]) / total), math.sqrt(rank * max(0.0, inside) / total))


def equiangular(tasks: int, rank: int, dimension: int, cosine: float, generator: torch.Generator) -> list[Tensor]:
    """Orthonormal rows V_t = √c S + √(1 − c) W_t [rank, dimension] of each task, with S and all W_t orthogonal to one
    another and random, so that V_s V_tᵀ = c I: all principal angles between any two have the cosine c."""
    count = (tasks + 1) * rank
    if count > dimension:
        raise ValueError(
            f"{tasks} subspaces of {rank} dimensions at equal angles are built in {count} dimensions; there are "
            f"{dimension}."
        )
    drawn = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    shared, *own = torch.linalg.qr(drawn).Q.T.split(rank)
    return [cosine**0.5 * shared + (1 - cosine) ** 0.5 * rows for rows in own]


def merged(frames: list[Tensor]) -> Subspace:
    """One float32 basis of all, with each task's share."""
    held = Subspace.empty(frames[0].new_empty(frames[0].shape[1], dtype=torch.float32))
    for task, rows in enumerate(frames):
        held = held.plus(rows.float(), torch.ones(len(rows)), task=task)
    return held


def leakage(steps: Tensor, rows: Tensor) -> float:
    """√(Σ‖V Δ‖² / Σ‖Δ‖²) over steps [n, d], in float64."""
    return float((steps @ rows.T).square().sum() / steps.square().sum()) ** 0.5


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows of the span of all, by singular values."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > 1e-10 * values[0]]


def trained(config: Training, seed: int) -> list[Record]:
    """Train on all tasks; what leaks in the last one, into the subspace of all before it."""
    experiences = PermutedDigits(config.tasks, seed=seed).train_stream
    torch.manual_seed(seed)
    model = mlp(64, 100, 10)
    watched = OrthogonalProjectionPlugin(
        Eigenspace(Fisher(), Rank(config.rank), examples=config.examples), projection=config.projection
    )
    watcher, chosen = Watcher(watched), config.optimiser
    strategy = Naive(
        model=model, optimizer=chosen.kind(model.parameters(), **chosen.options), criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch, train_epochs=config.steps,
        plugins=[watched, *([chosen.plugin()] if chosen.plugin else []), watcher, Steps(config.steps)],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    for experience in experiences:
        strategy.train(experience, eval_streams=[])
    overlap = torch.cat([watched.protected.angles(a, b) for b in range(1, config.tasks) for a in range(b)]).cos()
    return [
        {"metric": "overlap", "value": float(overlap.square().mean())},
        {"metric": "step", "value": watcher.of_steps},
        {"metric": "drift", "value": watcher.drift[max(watcher.drift)]},
        *({"metric": "drift/course", "value": value, "step": step} for step, value in watcher.drift.items()),
    ]


class Watcher(SupervisedPlugin):
    """Measures in each experience, in float64 and once all plugins before it have acted: ‖U Δ‖ / ‖Δ‖ of the drift since
    its start, after every tenth step and the first, and √(Σ‖U Δ‖² / Σ‖Δ‖²) over its steps."""

    def __init__(self, watched: OrthogonalProjectionPlugin) -> None:
        super().__init__()
        self.watched = watched
        self.drift: dict[int, float] = {}
        self._blocks: Sequence[ProtectedBlock] = ()
        self._start: Values = {}
        self._before: Values = {}
        self._sums = (0.0, 0.0)

    @property
    def of_steps(self) -> float:
        """√(Σ‖U Δ‖² / Σ‖Δ‖²)."""
        inside, total = self._sums
        return (inside / total) ** 0.5

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._blocks = tuple(self.watched.protected.blocks.values())
        self._start, self._sums, self.drift = _copy(strategy.model), (0.0, 0.0), {}

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self._before = _copy(strategy.model)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        now, step = _copy(strategy.model), strategy.clock.train_exp_iterations + 1  # the clock counts later
        inside, total = self._parts(now, self._before)
        self._sums = (self._sums[0] + inside, self._sums[1] + total)
        if step == 1 or step % EVERY == 0:
            inside, total = self._parts(now, self._start)
            self.drift[step] = (inside / total) ** 0.5

    def _parts(self, now: Values, start: Values) -> tuple[float, float]:
        """‖U Δ‖² and ‖Δ‖²."""
        bases = [(block.layout, block.subspace.rows.double()) for block in self._blocks]
        within = (layout.difference(now, start, rows) @ rows.T for layout, rows in bases)
        return (
            sum(float(part.square().sum()) for part in within),
            sum(float((value - start[name]).square().sum()) for name, value in now.items()),
        )


def _copy(model: nn.Module) -> Values:
    return {name: p.detach().to(torch.float64, copy=True) for name, p in model.named_parameters()}


experiment = Leakage()
