"""Three sources of error of a quadratic model: how stale it is, which curvature it takes, where training goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_curv import (
    GGN,
    Accumulate,
    AdaptiveRefresh,
    AllStored,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    Curvature,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    LowRank,
    Merge,
    Past,
    Policy,
    Rank,
    Refresh,
    SineBoundary,
    Structure,
)
from avalanche_curv.core.quadratic.adaptive import AdaptivePast, predicted_loss
from avalanche_curv.core.quadratic.policies import part_of
from avalanche_curv.core.risk.several import frozen_together
from benchmarks.experiments.sources.per_example import Derivatives, derivatives, has_kappa, losses_at, unit_of
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.methods import MemoryReplay
from benchmarks.training import CosinePerExperience, TimedEvaluation, Trainer, learner, mean, stacked, test_sets

BATCH = 5


@dataclass(frozen=True)
class Setting:
    """The research log's stream, model and training; `memory` of each task's examples are stored, and all that is known
    of the past is estimated on them."""

    experiences: int = 9
    steps: int = 100
    batch: int = 32
    rate: float = 1e-2
    weight_decay: float = 1e-3
    memory: float = 0.1
    every: int = 10


@dataclass(frozen=True)
class Recipe:
    """How a quadratic model of the past is estimated: by which policy, of which curvature, in which structure; and the
    names of the three."""

    policy_name: str
    kind_name: str
    structure_name: str
    policy: Policy
    curvature: Curvature
    structure: Structure

    @property
    def names(self) -> dict[str, str]:
        """The names, as keys of a record."""
        return {"policy": self.policy_name, "kind": self.kind_name, "structure": self.structure_name}


@dataclass(frozen=True)
class Config:
    """One trajectory ("sequential", "replay" or "regularised") and the quadratic models that are measured along it; a
    regularised one is trained with the only one of them, at `strength`."""

    trajectory: str
    recipes: tuple[Recipe, ...]
    setting: Setting
    strength: float = 1.0

    @property
    def label(self) -> str:
        if self.trajectory != "regularised":
            return self.trajectory
        return f"regularised by {', '.join(self.recipes[0].names.values())}"

    @property
    def cost(self) -> float:
        return float(len(self.recipes))


class Sources(Experiment):
    """|L − q| of the stored examples along each trajectory, for every policy, curvature and structure."""

    name = "sources"

    def configs(self, options: Options) -> Sequence[Config]:
        """Sequential training and replay once each, with all quadratic models beside them; regularised training with
        each of them that is dense or of the GGN."""
        setting, recipes = Setting(), all_recipes()
        if options.quick:
            setting, recipes = replace(setting, experiences=3, steps=10), recipes[::7]
        trained = (r for r in recipes if r.structure_name == "dense" or r.kind_name == "GGN" or options.quick)
        return [
            *(Config(trajectory, tuple(recipes), setting) for trajectory in ("sequential", "replay")),
            *(regularised(recipe, setting) for recipe in trained),
        ]

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Train along the trajectory; the error of every quadratic model, averaged over it, and the final accuracy."""
        benchmark = SineBoundary(config.setting.experiences, seed=seed)
        torch.manual_seed(seed)
        strategy, watcher = build(config)
        trainer = Trainer(strategy, strategy.evaluator)
        for experience in benchmark.train_stream:
            trainer.train(experience)
        where = {"trajectory": config.trajectory}
        trained_with = config.recipes[0].names if config.trajectory == "regularised" else {}
        accuracy = mean(trainer.accuracies(test_sets(benchmark, 1000)))
        records: list[Record] = [
            {"metric": metric, "value": value, **where, **trained_with}
            for metric, value in (("accuracy", accuracy), ("seconds", trainer.seconds))
        ]
        for one in watcher.watched:
            count = len(one.past.refreshes) / (config.setting.experiences - 1)
            values = {"error": mean(one.error), "gamma": mean(one.gamma), "refreshes": count}
            if one.kappa:
                values["kappa"] = mean(one.kappa)
            records += [{"metric": m, "value": value, **where, **one.recipe.names} for m, value in values.items()]
        return records


def all_recipes() -> list[Recipe]:
    """Every policy with every kind and structure. The exact Fisher is left out: with cross-entropy it is the GGN."""
    policies: dict[str, Policy] = {
        "accumulate": Accumulate(),
        "merge": Merge(),
        "refresh": Refresh(fraction=1.0),
        "refresh, slope": Refresh(fraction=1.0, gradient=True),
        "adaptive": AdaptiveRefresh(max_refreshes=10, look=AllStored(), fraction=1.0),
    }
    kinds: dict[str, Curvature] = {
        "Hessian": Hessian(),
        "GGN": GGN(),
        "Fisher, 1 sample": Fisher(samples=1, seed=0),
        "empirical": EmpiricalFisher(),
        "batched": BatchedEmpiricalFisher(BATCH),
    }
    structures: dict[str, Structure] = {
        "dense": Dense(), "block": BlockDiagonal(), "diagonal": Diagonal(), "low rank": LowRank(Rank(10)),
    }
    return [
        Recipe(policy, kind, structure, policies[policy], kinds[kind], structures[structure])
        for policy in policies for kind in kinds for structure in structures
    ]


def regularised(recipe: Recipe, setting: Setting) -> Config:
    """Training with a quadratic model at λ = 1: past experiences count as much as the present one. A Hessian is clipped
    to stay bounded below. The square of a mean over B examples is about 1/B of the mean of squares, so that the batched
    form is trained with at λ = B."""
    if recipe.kind_name == "Hessian":
        recipe = replace(recipe, curvature=Hessian(psd=Clip()))
    return Config("regularised", (recipe,), setting, float(BATCH) if recipe.kind_name == "batched" else 1.0)


def build(config: Config) -> tuple[Any, Watcher]:
    """Naive with what makes the trajectory, and the watcher."""
    setting, ewc = config.setting, None
    plugins: list[Any] = [CosinePerExperience(setting.steps)]
    if config.trajectory == "regularised":
        (recipe,) = config.recipes
        policy = OnPart(recipe.policy, setting.memory)
        ewc = CurvatureEWCPlugin(
            config.strength, curvature=recipe.curvature, structure=recipe.structure, policy=policy
        )
        plugins.insert(0, ewc)
    elif config.trajectory == "replay":
        plugins = MemoryReplay(1.0, setting.memory).plugins(0) + plugins
    model = nn.Sequential(nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 2))
    watcher = Watcher([Watched(recipe) for recipe in config.recipes], ewc, setting.memory, setting.every)
    evaluation = TimedEvaluation(loggers=[])
    strategy = learner(model, setting, [*plugins, watcher], evaluation, weight_decay=setting.weight_decay)
    return strategy, watcher


@dataclass(frozen=True)
class OnPart(Policy):
    """A policy that sees a random part of each experience only, so that all policies know the same examples."""

    policy: Policy
    fraction: float

    @property
    def revises(self) -> bool:  # type: ignore[override]
        return self.policy.revises

    def is_due(self, past: Past, iteration: int) -> bool:
        return self.policy.is_due(past, iteration)

    def absorb(self, past: Past, risk: EmpiricalRisk, curvature: Curvature, structure: Structure) -> Past:
        return self.policy.absorb(past, part_of(risk, self.fraction, 0, past.experiences), curvature, structure)

    def revise(
        self, past: Past, model: nn.Module, iteration: int, curvature: Curvature, structure: Structure
    ) -> Past:
        return self.policy.revise(past, model, iteration, curvature, structure)


@dataclass
class Watched:
    """A quadratic model along a trajectory, and its errors at the measured steps."""

    recipe: Recipe
    past: Past = field(default_factory=Past)
    kappa: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    gamma: list[float] = field(default_factory=list)

    @property
    def policy(self) -> Policy:
        return self.recipe.policy

    @property
    def moves(self) -> bool:
        """Whether every experience is anchored at the newest end, or later."""
        return not isinstance(self.policy, Accumulate)


class Watcher(SupervisedPlugin):
    """Keeps quadratic models up to date while a strategy trains, and measures them every n iterations: κ and error as
    the report defines them, γ = ‖∇L(θ) − ∇increase(θ)‖ / t."""

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
                kind, structure = one.recipe.curvature, one.recipe.structure
                one.past = one.policy.revise(one.past, strategy.model, self._updates, kind, structure)
        if self.own and self._updates % self.every == 0:
            self._measure(strategy.model)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        batches = [stacked(strategy.experience.dataset.eval())]
        risk = EmpiricalRisk.snapshot(strategy.model, strategy._criterion, batches)
        part = part_of(risk, self.memory, 0, len(self.own))
        for one in self.watched:
            if self.ewc is None:
                one.past = one.policy.absorb(one.past, part, one.recipe.curvature, one.recipe.structure)
        self.own.append(part)
        self.newest = [old.at(part) for old in self.own]
        own, newest = (sum(risk.value() for risk in risks) for risks in (self.own, self.newest))
        self._starts = (own, newest)

    def _measure(self, model: nn.Module) -> None:
        risks = frozen_together(self.own, model)
        loss, slope = sum(risk.value() for risk in risks), sum(risk.gradient() for risk in risks)
        count, theta = len(risks), risks[0].anchor
        self._forget()
        units = {unit_of(one.recipe.curvature) for one in self.watched}
        now = {size: [losses_at(size, risk, theta) for risk in risks] for size in units}
        for one in self.watched:
            past = one.past
            if past.model is not None:
                displacement = past.model.displacement(model)
                predicted = past.model.gradient_at(displacement) - AdaptivePast.of(past).damping * displacement
                one.error.append(abs(loss - self._start(one) - predicted_loss(past, model)) / count)
                one.gamma.append(float((slope - predicted).norm()) / count)
                if has_kappa(one.recipe.curvature, one.recipe.structure_name):
                    one.kappa.append(self._kappa(one, theta, now[unit_of(one.recipe.curvature)]))

    def _start(self, one: Watched) -> float:
        """Σ_t L_t where the quadratic model is zero; one of a revising policy holds it itself."""
        if one.policy.revises:
            return 0.0
        return self._starts[one.moves]

    def _kappa(self, one: Watched, theta: Tensor, now: list[Tensor]) -> float:
        """The mean of |κ_x| over all stored examples, whose losses are now those given."""
        frozen = list(one.past.stored) if one.policy.revises else self.newest
        curved = frozen if one.past.stored else self.own  # policies that store nothing keep the curvature of each end
        errors = []
        for number, (there, anchor) in enumerate(zip(curved, frozen if one.moves else self.own)):
            known = self._derivatives(one.recipe, number, there)
            at_anchor = known if there is anchor else self._derivatives(one.recipe, number, anchor)
            displacement = theta - at_anchor.anchor
            predicted = known.increase(one.recipe.structure_name, displacement)
            if getattr(one.policy, "gradient", one.policy.revises):
                predicted = predicted + at_anchor.gradients @ displacement
            errors.append(now[number] - at_anchor.losses - predicted)
        return float(torch.cat(errors).abs().mean())

    def _forget(self) -> None:
        """Drop the derivatives at anchors that no quadratic model has any more."""
        stored = [risk for one in self.watched for risk in one.past.stored]
        used = {risk.base for risk in (*self.own, *self.newest, *stored)}
        self._known = {key: value for key, value in self._known.items() if key[1] in used}

    def _derivatives(self, recipe: Recipe, number: int, risk: EmpiricalRisk) -> Derivatives:
        key = (recipe.kind_name, risk.base, number)  # the model itself: a freed one's number may be given to another
        if key not in self._known:
            self._known[key] = derivatives(recipe.curvature, risk)
        return self._known[key]


experiment = Sources()
