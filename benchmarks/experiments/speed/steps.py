"""Training steps through Avalanche's loop, with penalties and with metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin
from torch import nn

from avalanche_curv import (
    AbsoluteError,
    AdaptiveRefresh,
    CurvatureEWCPlugin,
    EmpiricalFisher,
    Fisher,
    Refresh,
    fidelity_metrics,
    landscape_metrics,
)
from benchmarks.experiments.speed.timing import Stopwatch, Times, interleaved, network, stream

if TYPE_CHECKING:
    from benchmarks.experiments.speed import Config


def steps(config: Config) -> Times:
    """A training step after many experiences."""
    many, idle = config.experiences, 10**9
    strategies = {
        "naive": _trained(config, [], 0),
        "curvature_ewc": _trained(config, [CurvatureEWCPlugin(1.0)], many),
        "curvature_ewc_one": _trained(config, [CurvatureEWCPlugin(1.0)], 1),
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



def _step_times(config: Config, strategies: dict[str, tuple[Any, Stopwatch]], rounds: int) -> Times:
    """The median step of each strategy in an experience, in turn."""
    experience = stream(config, config.steps * config.batch).train_stream[0]

    def work(strategy: Any, watch: Stopwatch) -> Callable[[], float]:
        def timed() -> float:
            strategy.clock.train_exp_counter = config.experiences  # Avalanche's EWC looks its memory up by this number
            strategy.train(experience, eval_streams=[])
            return watch.take()

        return timed

    return interleaved({name: work(*pair) for name, pair in strategies.items()}, rounds)



def _trained(
    config: Config, plugins: list[Any], experiences: int, metrics: Sequence[Any] = ()
) -> tuple[Any, Stopwatch]:
    """A strategy that has seen so many small experiences, and will remember no more."""
    watch, model = Stopwatch(), network(config)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch,
        plugins=[*plugins, watch],
        evaluator=EvaluationPlugin(*metrics, loggers=[]),
    )
    for number in range(experiences):
        strategy.train(stream(config, config.batch, seed=number).train_stream[0], eval_streams=[])
    for part in (*plugins, *metrics):
        part.after_training_exp = lambda *args, **kwargs: None
    watch.ends.clear()
    return strategy, watch
