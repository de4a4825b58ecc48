"""Passes over examples: estimates, fidelity, landscapes, and the looks and refreshes of a trust region."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training.plugins import EWCPlugin
from torch import nn

from avalanche_curv import (
    AbsoluteError,
    AdaptiveRefresh,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    Past,
    estimate,
    landscape,
)
from avalanche_curv.core.fidelity.monitor import PastModels
from avalanche_curv.core.quadratic.adaptive import memory_loss
from benchmarks.experiments.speed.timing import (
    Times,
    clocked,
    examples,
    gradient_passes,
    interleaved,
    network,
    perturb,
    stream,
)

if TYPE_CHECKING:
    from benchmarks.experiments.speed import Config


def estimates(config: Config) -> Times:
    """One pass over an experience's examples."""
    model, criterion = network(config), nn.CrossEntropyLoss()
    inputs, targets = examples(config.examples)
    batches = list(zip(inputs.split(config.batch), targets.split(config.batch)))
    ewc, data = EWCPlugin(1.0), stream(config, config.examples).train_stream[0].dataset

    def diagonal(kind: Any) -> Callable[[], Any]:
        return lambda: estimate(kind, Diagonal(), EmpiricalRisk.snapshot(model, criterion, batches))

    def importance() -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ewc.compute_importances(model, criterion, optimizer, data, torch.device("cpu"), config.batch)

    return interleaved(
        {
            "gradients": clocked(lambda: gradient_passes(model, criterion, batches)),
            "empirical_fisher": clocked(diagonal(EmpiricalFisher())),
            "fisher": clocked(diagonal(Fisher())),
            "ewc": clocked(importance),
        },
        config.rounds,
    )



def fidelities(config: Config) -> Times:
    """All fidelity values of ten past experiences' stored examples, one picture at a time."""
    model, criterion = network(config), nn.CrossEntropyLoss()
    pictures = PastModels(Fisher())
    past = min(10, config.experiences)
    for number in range(past):
        x, y = examples(config.stored, seed=number)
        pictures = pictures.with_experience(EmpiricalRisk.snapshot(model, criterion, [(x, y)]))
        perturb(model, number)
    inputs, targets = examples(config.stored * past)
    batches = list(zip(inputs.split(config.batch), targets.split(config.batch)))
    return interleaved(
        {
            "gradients": clocked(lambda: gradient_passes(model, criterion, batches)),
            "accumulate": clocked(lambda: pictures.compare_one("accumulate", model)),
            "refresh": clocked(lambda: pictures.compare_one("refresh", model)),
        },
        config.rounds,
    )



def instruments(config: Config) -> Times:
    """What a measured iteration takes beside its step, of ten past experiences; landscapes are of 200 examples."""
    model, criterion = network(config), nn.CrossEntropyLoss()
    policy, past = AdaptiveRefresh(AbsoluteError(1e-300), every=1, fraction=1.0), Past()
    for number in range(min(10, config.experiences)):
        risk = EmpiricalRisk.snapshot(model, criterion, [examples(config.stored, seed=number)])
        past = policy.absorb(past, risk, Fisher(), Diagonal())
    perturb(model, 0)
    some = EmpiricalRisk.snapshot(model, criterion, [examples(2 * config.stored)])
    inputs, targets = examples(config.batch)
    work: dict[str, Callable[[], Any]] = {
        "gradients": lambda: gradient_passes(model, criterion, [(inputs, targets)]),
        "check": lambda: memory_loss(past.stored, model),
        "refresh": lambda: policy.revise(past, model, 1, Fisher(), Diagonal()),
        "landscape_empirical": lambda: landscape(EmpiricalFisher(), some),
        "landscape_fisher": lambda: landscape(Fisher(), some),
        "landscape_hessian": lambda: landscape(Hessian(), some),
    }
    return interleaved({name: clocked(some_work) for name, some_work in work.items()}, min(3, config.rounds))
