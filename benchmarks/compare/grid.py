"""The methods of the comparison, each with a strength tuned on seeds that are never reported.

Strengths are the best of a grid of decades on `permuted_digits` (`python -m benchmarks run tune --seeds 2`), for
Avalanche's methods and ours alike. Other streams use the same ones.
"""

from __future__ import annotations

from avalanche_curv import (
    GGN,
    Absolute,
    Accumulate,
    AdaptiveRefresh,
    BatchedEmpiricalFisher,
    Curvature,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Kronecker,
    Merge,
    Policy,
    Refresh,
)
from benchmarks.compare.run import MEMORY
from benchmarks.methods import MAS, SI, AvalancheEWC, Joint, LwF, Method, Ours, Plain, Rehearsal

KINDS: dict[str, Curvature] = {
    "Hessian": Hessian(psd=Absolute()),
    "GGN": GGN(),
    "Fisher": Fisher(),
    "Fisher MC": Fisher(samples=1, seed=0),
    "empirical Fisher": EmpiricalFisher(),
    "batched emp. Fisher": BatchedEmpiricalFisher(batch_size=64),
}
EQUAL_TO_FISHER = ("Hessian", "GGN")  # their diagonals, on a ReLU network with cross-entropy
POLICIES: dict[str, Policy] = {"accumulate": Accumulate(), "merge": Merge(), "refresh": Refresh(fraction=MEMORY)}


STRENGTHS = {
    "EWC": 1000.0,
    "EWC online": 1000.0,
    "SI": 0.1,
    "MAS": 0.1,
    "LwF": 1.0,
    "Hessian": 10.0,
    "GGN": 10.0,
    "Fisher": 10.0,
    "Fisher MC": 10.0,
    "empirical Fisher": 10.0,
    "batched emp. Fisher": 1000.0,
}


def methods() -> dict[str, Method]:
    """The rows of the table."""
    return {**baselines(), **ours()}


def baselines() -> dict[str, Method]:
    """Avalanche's own strategies."""
    return {
        "Naive": Plain(),
        "Cumulative": Joint(),
        "Replay": Rehearsal(MEMORY),
        "EWC": AvalancheEWC(STRENGTHS["EWC"]),
        "EWC online": AvalancheEWC(STRENGTHS["EWC online"], decay=0.9),
        "SI": SI(STRENGTHS["SI"]),
        "MAS": MAS(STRENGTHS["MAS"]),
        "LwF": LwF(STRENGTHS["LwF"]),
    }


def ours() -> dict[str, Method]:
    """CurvatureEWC with each kind and policy, diagonal; kinds that equal the Fisher here with the first policy only.
    Adaptive refresh needs no tuning: at strength 1 it adds what the loss of the stored examples would."""
    rows: dict[str, Method] = {
        f"CurvatureEWC {name}, {policy}": Ours(STRENGTHS[name], kind, Diagonal(), chosen)
        for name, kind in KINDS.items()
        for policy, chosen in POLICIES.items()
        if name not in EQUAL_TO_FISHER or policy == "accumulate"
    }
    adaptive = AdaptiveRefresh(fraction=MEMORY)
    rows["CurvatureEWC Fisher, adaptive"] = Ours(1.0, Fisher(), Diagonal(), adaptive)
    rows["CurvatureEWC Fisher, Kronecker, adaptive"] = Ours(1.0, Fisher(), Kronecker(), adaptive)
    return rows
