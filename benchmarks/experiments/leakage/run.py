"""Two runs: random steps and random subspaces at prescribed angles, and the drift of a network on permuted digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    Rank,
    SequentialProjection,
    StepProjection,
)
from avalanche_curv.core.projection.blocks import Block
from avalanche_curv.core.projection.subspace import Subspace
from benchmarks.experiments.leakage.closed_form import expected
from benchmarks.harness.experiment import Record
from benchmarks.networks import mlp
from benchmarks.training import Steps

if TYPE_CHECKING:
    from benchmarks.experiments.leakage.experiment import Subspaces, Training

Values = dict[str, torch.Tensor]
EVERY = 10
PROJECTIONS = {"step": StepProjection(), "gradient": GradientProjection(), "sequential": SequentialProjection()}


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

    def make(self, model: torch.nn.Module) -> Any:
        return self.kind(model.parameters(), **self.options)

    def plugins(self) -> list[SupervisedPlugin]:
        return [] if self.plugin is None else [self.plugin()]


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


def trained(config: Training, seed: int) -> list[Record]:
    """Train on all tasks; what leaks in the last one, into the subspace of all before it."""
    experiences = PermutedDigits(config.tasks, seed=seed).train_stream
    torch.manual_seed(seed)
    model = mlp(64, 100, 10)
    watched = OrthogonalProjectionPlugin(
        Eigenspace(Fisher(), Rank(config.rank), examples=config.examples), projection=config.projection
    )
    watcher = Watcher(watched)
    strategy = Naive(
        model=model, optimizer=config.optimiser.make(model), criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch, train_epochs=config.steps,
        plugins=[watched, *config.optimiser.plugins(), watcher, Steps(config.steps)],
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
        self._blocks: Sequence[Block] = ()
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
