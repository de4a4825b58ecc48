"""Projected training steps through Avalanche's loop, and how a basis grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn

from avalanche_curv import OrthogonalProjectionPlugin, ProtectedSpace
from avalanche_curv.core.projection.blocks import Block, Layout
from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.risk.parameters import ParameterSpace
from benchmarks.experiments.speed.timing import Stopwatch, Times, clocked, interleaved, network, stream

if TYPE_CHECKING:
    from benchmarks.experiments.speed import Config

ROUNDS = 5  # of merges, at most


def projected(config: Config) -> Times:
    """A training step whose change is projected, with random bases; those of layers hold directions of their inputs."""
    spaces = {
        "naive": None,
        "flat_20": _flat(config, 20),
        "flat_100": _flat(config, 100),
        "inputs_100": _by_layer(config, 100),
    }
    experience = stream(config, config.steps * config.batch).train_stream[0]
    works = {name: _steps(config, space, experience) for name, space in spaces.items()}
    return interleaved(works, config.rounds)


def merges(config: Config) -> Times:
    """20 new directions that join 200, against all 220 orthonormalised from nothing."""
    size = ParameterSpace.of(network(config)).size
    rows = _orthonormal(220, size)
    held, new = Subspace(rows[:200].clone()), _orthonormal(20, size, seed=1)
    every = torch.cat([held.rows, new])
    works: dict[str, Callable[[], Any]] = {
        "qr": lambda: torch.linalg.qr(every.T),
        "merge": lambda: held.plus(new, torch.ones(len(new)), float(len(new))),
    }
    return interleaved({name: clocked(work) for name, work in works.items()}, min(ROUNDS, config.rounds))


def _steps(config: Config, space: ProtectedSpace | None, experience: Any) -> Callable[[], float]:
    """The median step of one experience, after which nothing more is protected."""
    watch, model = Stopwatch(), network(config)
    plugins: list[Any] = []
    if space is not None:
        plugins = [OrthogonalProjectionPlugin()]
        plugins[0].protected = space
        plugins[0].after_training_exp = lambda *args, **kwargs: None
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch,
        plugins=[*plugins, watch],
        evaluator=EvaluationPlugin(loggers=[]),
    )

    def timed() -> float:
        strategy.train(experience, eval_streams=[])
        return watch.take()

    return timed


def _flat(config: Config, rank: int) -> ProtectedSpace:
    """One basis over all parameters."""
    layout = Layout(ParameterSpace.of(network(config)))
    return ProtectedSpace({"": _block(layout, rank)}, experiences=1)


def _by_layer(config: Config, rank: int) -> ProtectedSpace:
    """For each layer a basis of what its inputs, and the 1 of its bias, may span."""
    whole = ParameterSpace.of(network(config))
    shapes = dict(zip(whole.names, whole.shapes))
    blocks = {}
    for name in whole.names:
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            own = (name, f"{layer}.bias")
            blocks[layer] = _block(Layout(ParameterSpace(own, tuple(shapes[n] for n in own)), stacked=True), rank)
    return ProtectedSpace(blocks, experiences=1)


def _block(layout: Layout, rank: int) -> Block:
    columns = layout.columns.size
    return Block(layout, Subspace(_orthonormal(min(rank, columns - 1), columns)))


def _orthonormal(count: int, size: int, seed: int = 0) -> Tensor:
    """Random orthonormal rows."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].T.contiguous()
