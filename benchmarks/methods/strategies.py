"""The strategies by the name that users type, each with the strengths to tune over and what is wrong with it upstream.

A method stands here at a strength to start from; `Named.grid` is what tuning tries
(`benchmarks.experiments.compare.tuning`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    Kronecker,
    Merge,
    Policy,
    Rank,
    Refresh,
)
from benchmarks.harness.errors import UsageError, unknown
from benchmarks.methods import faults
from benchmarks.methods.base import Method
from benchmarks.methods.bounds import AllAtOnce, Joint, Plain
from benchmarks.methods.gradient_memory import AGEM, GEM
from benchmarks.methods.ours import Ours, Projected, Spectral
from benchmarks.methods.penalties import MAS, SI, AvalancheEWC, FixedSI, LwF, RWalk
from benchmarks.methods.rehearsal import DarkReplay, GDumb, NearestMean, Rehearsal
from benchmarks.streams import SCENARIOS, TASK

MEMORY = 0.1


def decades(first: int, last: int) -> tuple[float, ...]:
    """Powers of ten.

    >>> decades(-1, 1)
    (0.1, 1.0, 10.0)
    """
    return tuple(float(f"1e{power}") for power in range(first, last + 1))


SQUARED_MEANS = decades(0, 6)  # importances from gradients of mini-batch means are small
MARGINS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)  # GEM's γ (Lopez-Paz & Ranzato 2017 use 0.5)
REPLAY_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Named:
    """A strategy under its name."""

    method: Method
    grid: tuple[float, ...] = ()
    """The strengths to tune over; empty where there is nothing to tune."""
    fault: str = ""
    """What is wrong with it upstream, for a note beside its row."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Scenario ↦ why it does not run there."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Those it runs in."""
        return tuple(scenario for scenario in SCENARIOS if scenario not in self.unfit)


KINDS: dict[str, Curvature] = {
    "Hessian": Hessian(psd=Absolute()),
    "GGN": GGN(),
    "Fisher": Fisher(),
    "Fisher MC": Fisher(samples=1, seed=0),
    "empirical Fisher": EmpiricalFisher(),
    "batched emp. Fisher": BatchedEmpiricalFisher(batch_size=64),
}
EQUAL_TO_FISHER = ("Hessian", "GGN")  # their diagonals, on a ReLU network with cross-entropy
STRENGTHS = {name: 1000.0 if isinstance(kind, BatchedEmpiricalFisher) else 10.0 for name, kind in KINDS.items()}

SLOW_HESSIAN = (
    "Its exact diagonal takes a pass for each parameter of a network with several heads, and equals the Fisher's on "
    "one of linear layers and ReLU."
)


def baselines(memory: float) -> dict[str, Named]:
    """Avalanche's own strategies, and one of them mended."""
    return {
        "Naive": Named(Plain()),
        "Cumulative": Named(Joint()),
        "JointTraining": Named(AllAtOnce()),
        "Replay": Named(Rehearsal(memory), fault=faults.REPLAY),
        "GDumb": Named(GDumb(memory), fault=faults.GDUMB),
        "DER": Named(DarkReplay(0.5, memory), REPLAY_WEIGHTS, faults.DER, faults.DER_UNFIT),
        "DER++": Named(DarkReplay(0.1, memory, labels=0.5), REPLAY_WEIGHTS, faults.DER, faults.DER_UNFIT),
        "iCaRL": Named(NearestMean(memory), fault=faults.ICARL, unfit=faults.ICARL_UNFIT),
        "GEM": Named(GEM(0.5, memory), MARGINS),
        "AGEM": Named(AGEM(memory)),
        "EWC": Named(AvalancheEWC(1000.0), SQUARED_MEANS, faults.EWC),
        "EWC online": Named(AvalancheEWC(1000.0, decay=0.9), SQUARED_MEANS, faults.EWC),
        "SI": Named(SI(0.1), fault=faults.SI),
        "SI fixed": Named(FixedSI(1.0), decades(0, 5), faults.FIXED_SI),
        "MAS": Named(MAS(0.1), decades(-2, 4), faults.MAS),
        "RWalk": Named(RWalk(0.1), decades(-2, 4), faults.RWALK),
        "LwF": Named(LwF(1.0), decades(-2, 2), faults.LWF),
    }


def ours(memory: float) -> dict[str, Named]:
    """CurvatureEWC with each kind and policy, diagonal, where kinds that equal the Fisher have the first policy only;
    then projections and spectral regularisation. Adaptive refresh needs no tuning: at strength 1 it adds what the loss
    of the stored examples would."""
    policies: dict[str, Policy] = {"accumulate": Accumulate(), "merge": Merge(), "refresh": Refresh(fraction=memory)}
    rows = {
        f"CurvatureEWC {name}, {policy}": Named(
            Ours(STRENGTHS[name], kind, Diagonal(), chosen),
            SQUARED_MEANS if isinstance(kind, BatchedEmpiricalFisher) else decades(-1, 5),
            unfit={TASK: SLOW_HESSIAN} if isinstance(kind, Hessian) else {},
        )
        for name, kind in KINDS.items()
        for policy, chosen in policies.items()
        if name not in EQUAL_TO_FISHER or policy == "accumulate"
    }
    adaptive = AdaptiveRefresh(fraction=memory)
    rows["CurvatureEWC Fisher, adaptive"] = Named(Ours(1.0, Fisher(), Diagonal(), adaptive))
    rows["CurvatureEWC Fisher, Kronecker, adaptive"] = Named(Ours(1.0, Fisher(), Kronecker(), adaptive))
    rows["GPM"] = Named(Projected(InputSpace(Energy(0.97))))
    rows["OrthogonalProjection Fisher"] = Named(Projected(Eigenspace(Fisher(), Rank(20))))
    rows["SpectralReg"] = Named(Spectral(1e-3), decades(-5, -1))
    return rows


def strategies(memory: float = MEMORY) -> dict[str, Named]:
    """All by name; those with a memory store the part `memory` of the training examples."""
    return {**baselines(memory), **ours(memory)}


STRATEGIES = strategies()


def named(name: str) -> Named:
    """The strategy of a name. Raises UsageError, with the nearest known one, where there is none."""
    if name not in STRATEGIES:
        raise UsageError(unknown("strategy", name, STRATEGIES))
    return STRATEGIES[name]
