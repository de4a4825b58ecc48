"""The methods of `benchmarks.strategies`, by name."""

from __future__ import annotations

from avalanche_curv import (
    GGN,
    Absolute,
    Accumulate,
    AdaptiveRefresh,
    BatchedEmpiricalFisher,
    Curvature,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    Energy,
    Fisher,
    Hessian,
    InputSpace,
    KeepTerms,
    Kronecker,
    Merge,
    Policy,
    Rank,
    Refresh,
)
from benchmarks.methods.base import AllAtOnce, Joint, Method, Plain
from benchmarks.methods.ours import Ours, Projected, Spectral
from benchmarks.methods.penalties import MAS, SI, AvalancheEWC, FixedSI, LwF, RWalk
from benchmarks.methods.rehearsal import AGEM, GEM, DarkReplay, GDumb, NearestMean, Rehearsal
from benchmarks.strategies import BATCHED, DIAGONAL, KRONECKER

KINDS: dict[str, Curvature] = {
    "Hessian": Hessian(psd=Absolute()),
    "GGN": GGN(),
    "Fisher": Fisher(),
    "Fisher MC": Fisher(samples=1, seed=0),
    "empirical Fisher": EmpiricalFisher(),
    BATCHED: BatchedEmpiricalFisher(batch_size=64),
}


def methods(memory: float) -> dict[str, Method]:
    """The method of each strategy, at a strength to start from; those with a memory store the part `memory` of the
    training examples.

    Adaptive refresh needs no tuning: at strength 1 it adds what the loss of the stored examples would.
    """
    policies: dict[str, Policy] = {"accumulate": Accumulate(), "merge": Merge(), "refresh": Refresh(fraction=memory)}
    adaptive = AdaptiveRefresh(fraction=memory)
    return {
        "Naive": Plain(),
        "Cumulative": Joint(),
        "JointTraining": AllAtOnce(),
        "Replay": Rehearsal(memory),
        "GDumb": GDumb(memory),
        "DER": DarkReplay(0.5, memory),
        "DER++": DarkReplay(0.1, memory, labels=0.5),
        "iCaRL": NearestMean(memory),
        "GEM": GEM(0.5, memory),
        "AGEM": AGEM(memory),
        "EWC": AvalancheEWC(1000.0),
        "EWC online": AvalancheEWC(1000.0, decay=0.9),
        "SI": SI(0.1),
        "SI fixed": FixedSI(1.0),
        "MAS": MAS(0.1),
        "RWalk": RWalk(0.1),
        "LwF": LwF(1.0),
        **{
            name: Ours(1000.0 if kind == BATCHED else 10.0, KINDS[kind], Diagonal(), policies[policy])
            for name, (kind, policy) in DIAGONAL.items()
        },
        **{name: Ours(10.0, Fisher(), Kronecker(KeepTerms()), policies[policy]) for name, policy in KRONECKER.items()},
        "CurvatureEWC Fisher, adaptive": Ours(1.0, Fisher(), Diagonal(), adaptive),
        "CurvatureEWC Fisher, Kronecker, adaptive": Ours(1.0, Fisher(), Kronecker(), adaptive),
        "GPM": Projected(InputSpace(Energy(0.97))),
        "OrthogonalProjection Fisher": Projected(Eigenspace(Fisher(), Rank(20))),
        "SpectralReg": Spectral(1e-3),
    }
