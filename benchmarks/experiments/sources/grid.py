"""The pictures that are crossed, and the trajectories along which they are measured."""

from __future__ import annotations

from dataclasses import replace

from avalanche_curv import (
    GGN,
    Accumulate,
    AdaptiveRefresh,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Clip,
    Curvature,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    LowRank,
    Merge,
    Policy,
    Rank,
    Refresh,
    Structure,
)
from benchmarks.experiments.sources import Config, Picture, Setting

POLICIES: dict[str, Policy] = {
    "accumulate": Accumulate(),
    "merge": Merge(),
    "refresh": Refresh(fraction=1.0),
    "refresh, slope": Refresh(fraction=1.0, gradient=True),
    "adaptive": AdaptiveRefresh(fraction=1.0),
}
BATCH = 5
KINDS: dict[str, Curvature] = {
    "Hessian": Hessian(),
    "GGN": GGN(),
    "Fisher, 1 sample": Fisher(samples=1, seed=0),
    "empirical": EmpiricalFisher(),
    "batched": BatchedEmpiricalFisher(BATCH),
}
STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "block": BlockDiagonal(),
    "diagonal": Diagonal(),
    "low rank": LowRank(Rank(10)),
}


def configs(quick: bool) -> list[Config]:
    """Sequential training and replay once each, with all pictures beside them; regularised training for each picture
    that is dense or of the GGN."""
    setting, pictures = Setting(), all_pictures()
    if quick:
        setting, pictures = replace(setting, experiences=3, steps=10), pictures[::7]
    return [
        Config("sequential", "sequential", tuple(pictures), setting),
        Config("replay", "replay", tuple(pictures), setting),
        *(regularised(p, setting) for p in pictures if p.structure_name == "dense" or p.kind_name == "GGN" or quick),
    ]


def all_pictures() -> list[Picture]:
    """Every policy with every kind and structure. The exact Fisher is left out: with cross-entropy it is the GGN."""
    return [
        Picture(policy_name, kind_name, structure_name, policy, kind, structure)
        for policy_name, policy in POLICIES.items()
        for kind_name, kind in KINDS.items()
        for structure_name, structure in STRUCTURES.items()
    ]


def regularised(picture: Picture, setting: Setting) -> Config:
    """Training with a picture at λ = 1: past experiences count as much as the present one. A Hessian is clipped to stay
    bounded below. The square of a mean over B examples is about 1/B of the mean of squares, which the batched form is
    given back."""
    if picture.kind_name == "Hessian":
        picture = replace(picture, curvature=Hessian(psd=Clip()))
    strength = float(BATCH) if picture.kind_name == "batched" else 1.0
    return Config(f"regularised by {picture.name}", "regularised", (picture,), setting, strength)
