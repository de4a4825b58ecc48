"""Pictures of the past kept up to date beside a training run, and their errors along it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_curv import Accumulate, CurvatureEWCPlugin, EmpiricalRisk, Past, Policy
from avalanche_curv.core.quadratic.adaptive import AdaptivePast, predicted_loss
from avalanche_curv.core.quadratic.policies import part_of
from avalanche_curv.core.risk.empirical_risk import frozen_together
from benchmarks.experiments.sources import Picture
from benchmarks.experiments.sources.grid import BATCH
from benchmarks.experiments.sources.pictures import Derivatives, derivatives, has_kappa, losses_at, unit_of


@dataclass
class Watched:
    """A picture along a trajectory, and its errors at the measured steps."""

    picture: Picture
    past: Past = field(default_factory=Past)
    kappa: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    gamma: list[float] = field(default_factory=list)

    @property
    def policy(self) -> Policy:
        return self.picture.policy

    @property
    def moves(self) -> bool:
        """Whether every experience is anchored at the newest end, or later."""
        return not isinstance(self.policy, Accumulate)



class Watcher(SupervisedPlugin):
    """Keeps pictures up to date while a strategy trains, and measures them every n iterations: κ and error as
    `benchmarks.experiments.sources.report` defines them, γ = ‖∇L(θ) − ∇increase(θ)‖ / t."""

    def __init__(self, watched: list[Watched], ewc: CurvatureEWCPlugin | None, memory: float, every: int) -> None:
        super().__init__()
        self.watched, self.ewc, self.memory, self.every = watched, ewc, memory, every
        self.own: list[EmpiricalRisk] = []  # the stored examples of each experience, frozen at its end
        self.newest: list[EmpiricalRisk] = []  # all of them, frozen at the newest end
        self._starts = (0.0, 0.0)  # Σ_t L_t at the own ends, and at the newest
        self._known: dict[tuple, Derivatives] = {}
        self._updates = 0

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._updates = 0

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self._updates += 1
        for one in self.watched:
            if self.ewc is not None:
                one.past = self.ewc.past
            elif one.policy.revises:
                kind, structure = one.picture.curvature, one.picture.structure
                one.past = one.policy.revise(one.past, strategy.model, self._updates, kind, structure)
        if self.own and self._updates % self.every == 0:
            self._measure(strategy.model)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        dataset = strategy.experience.dataset.eval()
        items = [dataset[index] for index in range(len(dataset))]
        batch = (torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items]))
        risk = EmpiricalRisk.snapshot(strategy.model, strategy._criterion, [batch])
        part = part_of(risk, self.memory, 0, len(self.own))
        for one in self.watched:
            if self.ewc is None:
                one.past = one.policy.absorb(one.past, part, one.picture.curvature, one.picture.structure)
        self.own.append(part)
        self.newest = [old.at(part) for old in self.own]
        own, newest = (sum(risk.value() for risk in risks) for risks in (self.own, self.newest))
        self._starts = (own, newest)

    def _measure(self, model: nn.Module) -> None:
        risks = frozen_together(self.own, model)
        loss, slope = sum(risk.value() for risk in risks), sum(risk.gradient() for risk in risks)
        count, theta = len(risks), risks[0].anchor
        self._forget()
        now: dict[int, list[Tensor]] = {size: [losses_at(size, risk, theta) for risk in risks] for size in (1, BATCH)}
        for one in self.watched:
            past = one.past
            if past.model is not None:
                displacement = past.model.displacement(model)
                predicted = past.model.gradient_at(displacement) - AdaptivePast.of(past).damping * displacement
                one.error.append(abs(loss - self._start(one) - predicted_loss(past, model)) / count)
                one.gamma.append(float((slope - predicted).norm()) / count)
                if has_kappa(one.picture.curvature, one.picture.structure_name):
                    one.kappa.append(self._kappa(one, theta, now[unit_of(one.picture.curvature)]))

    def _start(self, one: Watched) -> float:
        """Σ_t L_t where the picture is zero; that of a revising policy holds it itself."""
        if one.policy.revises:
            return 0.0
        return self._starts[one.moves]

    def _kappa(self, one: Watched, theta: Tensor, now: list[Tensor]) -> float:
        """The mean of |κ_x| over all stored examples, whose losses are now those given."""
        frozen = list(one.past.stored) if one.policy.revises else self.newest
        curved = frozen if one.past.stored else self.own  # policies that store nothing keep the curvature of each end
        errors = []
        for number, (there, anchor) in enumerate(zip(curved, frozen if one.moves else self.own)):
            known = self._derivatives(one.picture, number, there)
            at_anchor = known if there is anchor else self._derivatives(one.picture, number, anchor)
            displacement = theta - at_anchor.anchor
            predicted = known.increase(one.picture.structure_name, displacement)
            if getattr(one.policy, "gradient", one.policy.revises):
                predicted = predicted + at_anchor.gradients @ displacement
            errors.append(now[number] - at_anchor.losses - predicted)
        return float(torch.cat(errors).abs().mean())

    def _forget(self) -> None:
        """Drop the derivatives at anchors that no picture has any more."""
        stored = [risk for one in self.watched for risk in one.past.stored]
        used = {risk.base for risk in (*self.own, *self.newest, *stored)}
        self._known = {key: value for key, value in self._known.items() if key[1] in used}

    def _derivatives(self, picture: Picture, number: int, risk: EmpiricalRisk) -> Derivatives:
        key = (picture.kind_name, risk.base, number)  # the model itself: a freed one's number may be given to another
        if key not in self._known:
            self._known[key] = derivatives(picture.curvature, risk)
        return self._known[key]
