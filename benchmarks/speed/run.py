"""The work that is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, SupervisedPlugin
from torch import nn

from avalanche_curv import (
    AbsoluteError,
    AdaptiveRefresh,
    CurvatureEWCPlugin,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Past,
    Refresh,
    estimate,
    fidelity_metrics,
    landscape,
    landscape_metrics,
)
from avalanche_curv.core.adaptive import memory_loss
from avalanche_curv.core.monitor import PastPictures
from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.harness.experiment import Record

if TYPE_CHECKING:
    from benchmarks.speed import Config

Times = dict[str, list[float]]


def run(config: Config) -> list[Record]:
    """Times in milliseconds and ratios to the first of each group."""
    records: list[Record] = []
    for group, measure in GROUPS.items():
        times = measure(config)
        base = next(iter(times.values()))
        for name, values in times.items():
            ratio = statistics.median(value / reference for value, reference in zip(values, base))
            records += [
                {"metric": f"{group}/{name}/milliseconds", "value": 1e3 * statistics.median(values)},
                {"metric": f"{group}/{name}/ratio", "value": ratio},
            ]
    return records


class Stopwatch(SupervisedPlugin):
    """The median time from one iteration's end to the next's: the whole step with its data loading."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def take(self) -> float:
        median = statistics.median(b - a for a, b in zip(self.ends, self.ends[1:]))
        self.ends.clear()
        return median


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
    experience = _stream(config, config.steps * config.batch).train_stream[0]

    def work(strategy: Any, watch: Stopwatch) -> Callable[[], float]:
        def timed() -> float:
            strategy.clock.train_exp_counter = config.experiences  # Avalanche's EWC looks its memory up by this number
            strategy.train(experience, eval_streams=[])
            return watch.take()

        return timed

    return interleaved({name: work(*pair) for name, pair in strategies.items()}, rounds)


def estimates(config: Config) -> Times:
    """One pass over an experience's examples."""
    model, criterion = _model(config), nn.CrossEntropyLoss()
    inputs, targets = _examples(config.examples)
    batches = list(zip(inputs.split(config.batch), targets.split(config.batch)))
    ewc, data = EWCPlugin(1.0), _stream(config, config.examples).train_stream[0].dataset

    def diagonal(kind: Any) -> Callable[[], Any]:
        return lambda: estimate(kind, Diagonal(), EmpiricalRisk.snapshot(model, criterion, batches))

    def importance() -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ewc.compute_importances(model, criterion, optimizer, data, torch.device("cpu"), config.batch)

    return interleaved(
        {
            "gradients": clocked(lambda: _gradients(model, criterion, batches)),
            "empirical_fisher": clocked(diagonal(EmpiricalFisher())),
            "fisher": clocked(diagonal(Fisher())),
            "ewc": clocked(importance),
        },
        config.rounds,
    )


def fidelities(config: Config) -> Times:
    """All fidelity values of ten past experiences' stored examples, one picture at a time."""
    model, criterion = _model(config), nn.CrossEntropyLoss()
    pictures = PastPictures(Fisher())
    past = min(10, config.experiences)
    for number in range(past):
        x, y = _examples(config.stored, seed=number)
        pictures = pictures.with_experience(EmpiricalRisk.snapshot(model, criterion, [(x, y)]))
        _perturb(model, number)
    inputs, targets = _examples(config.stored * past)
    batches = list(zip(inputs.split(config.batch), targets.split(config.batch)))
    return interleaved(
        {
            "gradients": clocked(lambda: _gradients(model, criterion, batches)),
            "accumulate": clocked(lambda: pictures.compare_picture("accumulate", model)),
            "refresh": clocked(lambda: pictures.compare_picture("refresh", model)),
        },
        config.rounds,
    )


def instruments(config: Config) -> Times:
    """What a measured iteration takes beside its step, of ten past experiences; landscapes are of 200 examples."""
    model, criterion = _model(config), nn.CrossEntropyLoss()
    policy, past = AdaptiveRefresh(AbsoluteError(1e-300), every=1, fraction=1.0), Past()
    for number in range(min(10, config.experiences)):
        risk = EmpiricalRisk.snapshot(model, criterion, [_examples(config.stored, seed=number)])
        past = policy.absorb(past, risk, Fisher(), Diagonal())
    _perturb(model, 0)
    some = EmpiricalRisk.snapshot(model, criterion, [_examples(2 * config.stored)])
    inputs, targets = _examples(config.batch)
    work: dict[str, Callable[[], Any]] = {
        "gradients": lambda: _gradients(model, criterion, [(inputs, targets)]),
        "check": lambda: memory_loss(past.stored, model),
        "refresh": lambda: policy.revise(past, model, 1, Fisher(), Diagonal()),
        "landscape_empirical": lambda: landscape(EmpiricalFisher(), some),
        "landscape_fisher": lambda: landscape(Fisher(), some),
        "landscape_hessian": lambda: landscape(Hessian(), some),
    }
    return interleaved({name: clocked(some_work) for name, some_work in work.items()}, min(3, config.rounds))


def interleaved(work: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Seconds of each, in turn, `rounds` times after one warm-up."""
    times: Times = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, timed in work.items():
            seconds = timed()
            if number:
                times[name].append(seconds)
    return times


def clocked(work: Callable[[], Any]) -> Callable[[], float]:
    """The seconds that some work takes."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timed


def _trained(
    config: Config, plugins: list[Any], experiences: int, metrics: Sequence[Any] = ()
) -> tuple[Any, Stopwatch]:
    """A strategy that has seen so many small experiences, and will remember no more."""
    watch, model = Stopwatch(), _model(config)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch,
        plugins=[*plugins, watch],
        evaluator=EvaluationPlugin(*metrics, loggers=[]),
    )
    for number in range(experiences):
        strategy.train(_stream(config, config.batch, seed=number).train_stream[0], eval_streams=[])
    for part in (*plugins, *metrics):
        part.after_training_exp = lambda *args, **kwargs: None
    watch.ends.clear()
    return strategy, watch


def _model(config: Config) -> nn.Module:
    h = config.hidden
    return nn.Sequential(nn.Linear(784, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))


def _perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)


def _examples(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 784, generator=generator), torch.randint(10, (count,), generator=generator)


def _stream(config: Config, count: int, seed: int = 0) -> Any:
    data = Examples(*_examples(count, seed))
    return benchmark([(data, data)], [0], 10)


def _gradients(model: nn.Module, criterion: nn.Module, batches: list) -> None:
    parameters = list(model.parameters())
    for x, y in batches:
        torch.autograd.grad(criterion(model(x), y), parameters)


GROUPS: dict[str, Callable[[Config], Times]] = {
    "step": steps,
    "estimate": estimates,
    "fidelity": fidelities,
    "on": instruments,
    "measured": measured,
}
