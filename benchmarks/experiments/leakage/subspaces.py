"""Random steps and random subspaces at prescribed angles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avalanche_curv.core.projection.subspace import Subspace
from benchmarks.experiments.leakage.closed_form import expected
from benchmarks.harness.experiment import Record

if TYPE_CHECKING:
    from benchmarks.experiments.leakage import Subspaces


def run(config: Subspaces, seed: int) -> Iterator[Record]:
    """The leakage of both ways into the first task's subspace and into the union, over so many tasks."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(config.draws, config.dimension, generator=generator, dtype=torch.float64)
    for tasks in config.tasks:
        frames = equiangular(tasks, config.rank, config.dimension, config.cosine, generator)
        union = _span(torch.cat(frames))
        held = merged(frames)
        yield {"metric": "used", "value": held.rank, "step": tasks}
        given = steps.float()
        for way in ("global", "sequential"):
            left = held.withdraw(given.clone(), given, by_task=way == "sequential").double()
            yield {"metric": f"{way}/first", "value": leakage(left, frames[0]), "step": tasks}
            yield {"metric": f"{way}/union", "value": leakage(left, union), "step": tasks}
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
    """Orthonormal rows of the same span, by singular values."""
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > 1e-10 * values[0]]
