"""Training steps through Avalanche's loop: with penalties, with metrics and with projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training.plugins import EWCPlugin
from torch import Tensor, nn

from avalanche_curv import (
    EKFAC,
    AbsoluteError,
    AdaptiveRefresh,
    CurvatureEWCPlugin,
    Eigenspace,
    EmpiricalFisher,
    Fisher,
    Kronecker,
    LowRank,
    Merge,
    OrthogonalProjectionPlugin,
    ProtectedSpace,
    Rank,
    Refresh,
    fidelity_metrics,
    landscape_metrics,
)
from avalanche_curv.core.projection.blocks import Layout, ProtectedBlock
from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.risk.parameters import ParameterSpace
from benchmarks.timing import Stopwatch, Times, experience, interleaved, naive

if TYPE_CHECKING:
    from benchmarks.experiments.speed.experiment import Config


def network(config: Config) -> nn.Module:
    """784-hidden-hidden-10 with ReLU, drawn from torch's current random state."""
    h = config.hidden
    return nn.Sequential(nn.Linear(784, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))


def synthetic(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs [count, 784] in [0, 1] and random classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)


def orthonormal(count: int, size: int, seed: int = 0) -> Tensor:
    """Random orthonormal rows [count, size]."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].T.contiguous()


KEPT = Rank(48)
"""Eigenvectors of each factor: those of a row of the experiment `ewc_permuted_mnist`, since of the spectra of synthetic
tasks a part of the trace says nothing."""

BOUNDED = {
    "kronecker": Kronecker(),
    "kronecker_cut": Kronecker(cut=KEPT),
    "ekfac_cut": EKFAC(cut=KEPT),
    "low_rank": LowRank(Rank(10), max_rank=10),
}
"""Structures whose sums do not grow."""


def penalised(config: Config) -> Times:
    """A training step after many experiences."""
    many, idle = config.experiences, 10**9
    bounded = {name: CurvatureEWCPlugin(1.0, curvature=EmpiricalFisher(), structure=structure, policy=Merge())
               for name, structure in BOUNDED.items()}  # fmt: skip
    strategies = {
        "naive": _trained(config, [], 0),
        "curvature_ewc": _trained(config, [CurvatureEWCPlugin(1.0)], many),
        "curvature_ewc_one": _trained(config, [CurvatureEWCPlugin(1.0)], 1),
        **{name: _trained(config, [plugin], many) for name, plugin in bounded.items()},
        "ewc_separate": _trained(config, [EWCPlugin(1.0)], many),
        "ewc_online": _trained(config, [EWCPlugin(1.0, mode="online", decay_factor=0.9)], many),
        "idle": _trained(config, [], 0, (*fidelity_metrics(every=idle), *landscape_metrics(every=idle))),
    }
    return _step_times(config, strategies, config.rounds)


def measured(config: Config) -> Times:
    """A training step that metrics measure, with two past experiences; landscapes of 200 current examples."""
    fraction = min(1.0, 2 * config.stored / (config.steps * config.batch))
    chosen: dict[str, Sequence[Any]] = {
        "naive": (),
        "fidelity": fidelity_metrics(every=1, fraction=1.0),
        "landscape_empirical": landscape_metrics(every=1, fraction=fraction, curvature=EmpiricalFisher()),
        "landscape_fisher": landscape_metrics(every=1, fraction=fraction, curvature=Fisher()),
    }
    strategies = {name: _trained(config, [], 2, metrics) for name, metrics in chosen.items()}
    looking = AdaptiveRefresh(AbsoluteError(1e9), every=1, fraction=1.0)
    for name, policy in (("refresh", Refresh(fraction=1.0)), ("adaptive", looking)):
        strategies[name] = _trained(config, [CurvatureEWCPlugin(1.0, policy=policy)], 2)
    return _step_times(config, strategies, min(3, config.rounds))


def projected(config: Config) -> Times:
    """A training step whose change is projected, with random bases; those of layers hold directions of their inputs."""
    spaces = {
        "naive": None,
        "flat_20": _flat(config, 20),
        "flat_100": _flat(config, 100),
        "inputs_100": _by_layer(config, 100),
    }
    strategies = {name: _trained(config, [] if space is None else [_protecting(space)], 0)
                  for name, space in spaces.items()}
    return _step_times(config, strategies, config.rounds)


def _step_times(config: Config, strategies: dict[str, tuple[Any, Stopwatch]], rounds: int) -> Times:
    """The median step of each strategy in an experience, in turn."""
    timed_on = experience(*synthetic(config.steps * config.batch))

    def work(strategy: Any, watch: Stopwatch) -> Callable[[], float]:
        def timed() -> float:
            strategy.clock.train_exp_counter = config.experiences  # Avalanche's EWC looks its memory up by this number
            strategy.train(timed_on, eval_streams=[])
            return watch.take()

        return timed

    return interleaved({name: work(*pair) for name, pair in strategies.items()}, rounds)


def _trained(
    config: Config, plugins: list[Any], experiences: int, metrics: Sequence[Any] = ()
) -> tuple[Any, Stopwatch]:
    """A strategy that has seen so many small experiences, and will remember no more."""
    watch = Stopwatch()
    strategy = naive(network(config), config.batch, [*plugins, watch], metrics)
    for number in range(experiences):
        strategy.train(experience(*synthetic(config.batch, number)), eval_streams=[])
    for part in (*plugins, *metrics):
        part.after_training_exp = lambda *args, **kwargs: None
    watch.ends.clear()
    return strategy, watch


def _protecting(space: ProtectedSpace) -> OrthogonalProjectionPlugin:
    plugin = OrthogonalProjectionPlugin(Eigenspace())
    plugin.protected = space
    return plugin


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


def _block(layout: Layout, rank: int) -> ProtectedBlock:
    columns = layout.columns.size
    return ProtectedBlock(layout, Subspace(orthonormal(min(rank, columns - 1), columns)))
