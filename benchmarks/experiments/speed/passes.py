"""Passes over examples (estimates, fidelity, landscapes, the checks and refreshes of a trust region), and how a basis
grows."""

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
from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.quadratic.adaptive import memory_loss
from avalanche_curv.core.risk.parameters import ParameterSpace
from benchmarks.experiments.speed.steps import network, orthonormal, synthetic
from benchmarks.timing import Times, batches_of, clocked, experience, gradient_passes, interleaved, perturb

if TYPE_CHECKING:
    from benchmarks.experiments.speed.experiment import Config

MERGES = 5  # rounds, at most


def estimates(config: Config) -> Times:
    """One pass over an experience's examples."""
    model, criterion = network(config), nn.CrossEntropyLoss()
    data = synthetic(config.examples)
    batches, dataset, ewc = batches_of(data, config.batch), experience(*data).dataset, EWCPlugin(1.0)

    def diagonal(kind: Any) -> Callable[[], Any]:
        return lambda: estimate(kind, Diagonal(), EmpiricalRisk.snapshot(model, criterion, batches))

    def importance() -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ewc.compute_importances(model, criterion, optimizer, dataset, torch.device("cpu"), config.batch)

    return interleaved(
        {
            "gradients": clocked(gradient_passes(model, batches)),
            "empirical_fisher": clocked(diagonal(EmpiricalFisher())),
            "fisher": clocked(diagonal(Fisher())),
            "ewc": clocked(importance),
        },
        config.rounds,
    )


def fidelities(config: Config) -> Times:
    """All fidelity values of ten past experiences' stored examples, one model at a time."""
    model, criterion = network(config), nn.CrossEntropyLoss()
    models = PastModels(Fisher())
    past = min(10, config.experiences)
    for number in range(past):
        x, y = synthetic(config.stored, seed=number)
        models = models.with_experience(EmpiricalRisk.snapshot(model, criterion, [(x, y)]))
        perturb(model, number)
    batches = batches_of(synthetic(config.stored * past), config.batch)
    return interleaved(
        {
            "gradients": clocked(gradient_passes(model, batches)),
            "accumulate": clocked(lambda: models.compare_one("accumulate", model)),
            "refresh": clocked(lambda: models.compare_one("refresh", model)),
        },
        config.rounds,
    )


def instruments(config: Config) -> Times:
    """What a measured iteration takes beside its step, of ten past experiences; landscapes are of 200 examples."""
    model, criterion = network(config), nn.CrossEntropyLoss()
    policy, past = AdaptiveRefresh(AbsoluteError(1e-300), every=1, fraction=1.0), Past()
    for number in range(min(10, config.experiences)):
        risk = EmpiricalRisk.snapshot(model, criterion, [synthetic(config.stored, seed=number)])
        past = policy.absorb(past, risk, Fisher(), Diagonal())
    perturb(model, 0)
    some = EmpiricalRisk.snapshot(model, criterion, [synthetic(2 * config.stored)])
    work: dict[str, Callable[[], Any]] = {
        "gradients": gradient_passes(model, [synthetic(config.batch)]),
        "check": lambda: memory_loss(past.stored, model),
        "refresh": lambda: policy.revise(past, model, 1, Fisher(), Diagonal()),
        "landscape_empirical": lambda: landscape(EmpiricalFisher(), some),
        "landscape_fisher": lambda: landscape(Fisher(), some),
        "landscape_hessian": lambda: landscape(Hessian(), some),
    }
    return interleaved({name: clocked(some_work) for name, some_work in work.items()}, min(3, config.rounds))


def merges(config: Config) -> Times:
    """20 new directions that join 200, against all 220 orthonormalised from nothing."""
    size = ParameterSpace.of(network(config)).size
    rows = orthonormal(220, size)
    held, new = Subspace(rows[:200].clone()), orthonormal(20, size, seed=1)
    every = torch.cat([held.rows, new])
    works: dict[str, Callable[[], Any]] = {
        "qr": lambda: torch.linalg.qr(every.T),
        "merge": lambda: held.plus(new, torch.ones(len(new)), float(len(new))),
    }
    return interleaved({name: clocked(work) for name, work in works.items()}, min(MERGES, config.rounds))
