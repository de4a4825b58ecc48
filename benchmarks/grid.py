"""The methods of the comparison, with strengths tuned for each stream on seeds that are never reported."""

from __future__ import annotations

from avalanche_curv import (
    GGN,
    Absolute,
    Accumulate,
    BatchedEmpiricalFisher,
    Curvature,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Merge,
    Policy,
    Refresh,
)
from benchmarks.compare_run import MEMORY
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


def methods(stream: str) -> dict[str, Method]:
    """The rows of the table."""
    return {**baselines(stream), **ours(stream)}


def baselines(stream: str) -> dict[str, Method]:
    """Avalanche's own strategies."""
    chosen = STRENGTHS.get(stream, {})
    return {
        "Naive": Plain(),
        "Cumulative": Joint(),
        "Replay": Rehearsal(MEMORY),
        "EWC": AvalancheEWC(chosen.get("EWC", 100.0)),
        "EWC online": AvalancheEWC(chosen.get("EWC online", 100.0), decay=0.9),
        "SI": SI(chosen.get("SI", 1.0)),
        "MAS": MAS(chosen.get("MAS", 1.0)),
        "LwF": LwF(chosen.get("LwF", 1.0)),
    }


def ours(stream: str) -> dict[str, Method]:
    """CurvatureEWC with each kind and policy, diagonal."""
    chosen = STRENGTHS.get(stream, {})
    labels = {f"CurvatureEWC {kind}, {policy}": (kind, policy) for kind in KINDS for policy in POLICIES}
    return {
        label: Ours(chosen.get(label, 100.0), KINDS[kind], Diagonal(), POLICIES[policy])
        for label, (kind, policy) in labels.items()
    }


STRENGTHS: dict[str, dict[str, float]] = {}
