"""The rows of each stream, with strengths tuned on seeds that are never reported."""

from __future__ import annotations

from avalanche_curv import (
    GGN,
    AdaptiveRefresh,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    MatrixFree,
    Rank,
    Refresh,
    RelativeError,
    Structure,
)
from benchmarks.experiments.trust_region import Setting
from benchmarks.methods import AvalancheEWC, MemoryReplay, Method, Ours, Plain, Rehearsal

TOLERANCES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
MNIST_TOLERANCES = (0.5, 0.2, 0.1, 0.05)
CHOSEN = 0.1
CAPS = (3, 6)
EWC, PER_TASK, WITH_SLOPE = "Avalanche's EWC", "refresh per task", "refresh per task, slope"
DAMPED = "refresh per task, slope, damped"
NAIVE, REPLAY, AVALANCHE_REPLAY = "Naive", "replay", "Avalanche's Replay"

STRENGTHS = {  # `run tune --target trust_region --seeds 2 --dataset-root DIR`
    ("sine", EWC): 100000.0,
    ("sine", PER_TASK): 1.0,
    ("sine", WITH_SLOPE): 1.0,
    ("split_digits", EWC): 10000.0,
    ("split_digits", PER_TASK): 100.0,
    ("split_digits", WITH_SLOPE): 100.0,
    ("permuted_digits", EWC): 1000.0,
    ("permuted_digits", PER_TASK): 10.0,
    ("permuted_digits", WITH_SLOPE): 1.0,
    ("split_mnist", EWC): 10000.0,
    ("split_mnist", PER_TASK): 1.0,
    ("split_mnist", WITH_SLOPE): 100.0,
    ("split_mnist_domain", EWC): 100000.0,
    ("split_mnist_domain", PER_TASK): 100.0,
    ("split_mnist_domain", WITH_SLOPE): 10.0,
}


def methods(setting: Setting, quick: bool) -> dict[str, Method]:
    """From the loosest to the tightest, between what forgets and what replays."""
    tolerances = (CHOSEN,) if quick else MNIST_TOLERANCES if setting.mnist else TOLERANCES
    rows = {NAIVE: Plain(), **penalised(setting), DAMPED: adaptive(setting, CHOSEN, 0)}
    rows |= {f"adaptive {tolerance:g}": adaptive(setting, tolerance) for tolerance in tolerances}
    rows |= {f"adaptive {CHOSEN:g}, at most {cap}": adaptive(setting, CHOSEN, cap) for cap in CAPS}
    if setting.stream == "split_digits":
        others = {"diagonal": Diagonal(), "Kronecker": Kronecker(), "matrix-free": MatrixFree()}
        rows |= {f"adaptive {CHOSEN:g}, {name}": adaptive(setting, CHOSEN, None, s) for name, s in others.items()}
    return rows | {REPLAY: MemoryReplay(1.0, setting.memory), AVALANCHE_REPLAY: Rehearsal(setting.memory)}


def penalised(setting: Setting) -> dict[str, Method]:
    """The methods whose strength is tuned."""
    names = (EWC, PER_TASK, WITH_SLOPE)
    return {name: at_strength(setting, name, STRENGTHS[setting.stream, name]) for name in names}


def at_strength(setting: Setting, name: str, strength: float) -> Method:
    """One of them at a strength."""
    if name == EWC:
        return AvalancheEWC(strength)
    policy = Refresh(setting.memory, gradient=name == WITH_SLOPE)
    return Ours(strength, GGN(), structure_for(setting), policy)


def adaptive(setting: Setting, tolerance: float, cap: int | None = None, structure: Structure | None = None) -> Method:
    """Strength 1: the criterion plus the summed loss of past experiences, as in replay."""
    policy = AdaptiveRefresh(RelativeError(tolerance), max_refreshes=cap, fraction=setting.memory)
    return Ours(1.0, GGN(), structure or structure_for(setting), policy)


def structure_for(setting: Setting) -> Structure:
    return Dense() if setting.stream == "sine" else LowRank(Rank(20))
