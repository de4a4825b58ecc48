"""Three sources of error of a quadratic model: how stale it is, which curvature it takes, where training goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.sources.report import report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Curvature, Policy, Structure
    from benchmarks.harness.results import Results

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

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.sources.trajectory import run

        return run(config, seed)

    def report(self, results: Results, out: Path) -> str:
        return report(results)


def all_recipes() -> list[Recipe]:
    """Every policy with every kind and structure. The exact Fisher is left out: with cross-entropy it is the GGN."""
    from avalanche_curv import (
        GGN,
        Accumulate,
        AdaptiveRefresh,
        BatchedEmpiricalFisher,
        BlockDiagonal,
        Dense,
        Diagonal,
        EmpiricalFisher,
        Fisher,
        Hessian,
        LowRank,
        Merge,
        Rank,
        Refresh,
    )

    policies: dict[str, Policy] = {
        "accumulate": Accumulate(),
        "merge": Merge(),
        "refresh": Refresh(fraction=1.0),
        "refresh, slope": Refresh(fraction=1.0, gradient=True),
        "adaptive": AdaptiveRefresh(fraction=1.0),
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
    from avalanche_curv import Clip, Hessian

    if recipe.kind_name == "Hessian":
        recipe = replace(recipe, curvature=Hessian(psd=Clip()))
    return Config("regularised", (recipe,), setting, float(BATCH) if recipe.kind_name == "batched" else 1.0)


experiment = Sources()
