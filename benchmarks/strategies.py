"""The strategies by the name that users type: the strengths that tuning tries, and what is wrong upstream.

`benchmarks.methods.methods` builds them. Importing this imports neither torch nor Avalanche, so that reports can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.streams import SCENARIOS, TASK


@dataclass(frozen=True)
class Strategy:
    """What is known of a strategy. Faults are those of Avalanche 0.6.0; tests/upstream shows each."""

    grid: tuple[float, ...] = ()
    """The strengths to tune over; empty where there is nothing to tune."""
    fault: str = ""
    """What is wrong with it upstream, for a note beside its row."""
    stores: bool = False
    """Whether it keeps examples of the past; a model, importances or a basis are none."""
    unfit: Mapping[str, str] = field(default_factory=dict)
    """Scenario ↦ why it does not run there."""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """Those it runs in."""
        return tuple(scenario for scenario in SCENARIOS if scenario not in self.unfit)


def decades(first: int, last: int) -> tuple[float, ...]:
    """Powers of ten.

    >>> decades(-1, 1)
    (0.1, 1.0, 10.0)
    """
    return tuple(float(f"1e{power}") for power in range(first, last + 1))


SQUARED_MEANS = decades(0, 6)  # importances from gradients of mini-batch means are small
MARGINS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)  # GEM's γ (Lopez-Paz & Ranzato 2017 use 0.5)
REPLAY_WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

REPLAY = "From the second experience on a step sees twice the batch: that of the memory on top of the new one."
DER = Strategy(
    REPLAY_WEIGHTS, f"{REPLAY} Replays nothing, without a word, while its memory is smaller than the batch.",
    stores=True,
    unfit={
        TASK: "Avalanche 0.6 computes the logits that it stores without the task labels that heads need (TypeError)."
    },
)
EWC = Strategy(
    SQUARED_MEANS,
    "Avalanche 0.6 squares gradients of mini-batch means, which is not the Fisher, and its penalty has no ½: its λ has "
    "a scale of its own.",
)
AVALANCHES = {
    "Naive": Strategy(),
    "Cumulative": Strategy(stores=True),
    "JointTraining": Strategy(stores=True),
    "Replay": Strategy(fault=REPLAY, stores=True),
    "GDumb": Strategy(
        fault="Draws its memory before the first step: from there on its batches are not those of the other rows.",
        stores=True,
    ),
    "DER": DER,
    "DER++": DER,
    "iCaRL": Strategy(
        fault="Avalanche 0.6 averages a class over its images and their mirror images, which for digits are no such "
        "class; classes not seen yet have the mean 0. With BatchNorm its teacher stays in train mode.",
        stores=True,
        unfit={
            "task": "It has one classifier for all classes and no use for task labels.",
            "domain": "Its loss and its memory need each class in one experience only.",
        },
    ),
    "GEM": Strategy(MARGINS, stores=True),
    "AGEM": Strategy(stores=True),
    "EWC": EWC,
    "EWC online": EWC,
    "SI": Strategy(
        fault="Its stored weights alias the live ones on a CPU (Avalanche 0.6), so its penalty is zero: equal to "
        "Naive, but for the momentum with which zero gradients let the heads of past tasks drift."
    ),
    "SI fixed": Strategy(
        decades(0, 5), "Ours, from the paper (Zenke et al. 2017), because Avalanche's has no effect on a CPU."
    ),
    "MAS": Strategy(
        decades(-2, 4),
        "Avalanche 0.6 computes its importance in train mode (which matters with dropout or BatchNorm), from gradients "
        "of mini-batch means, and averages over experiences with weight ½ where the paper adds. It raised at a loss of "
        "exactly zero; here it does not.",
    ),
    "RWalk": Strategy(
        decades(-2, 4),
        "Avalanche 0.6 trains the model in eval mode: no dropout, and BatchNorm never learns its statistics. It fails "
        "on new heads and is NaN after experiences of fewer than 10 steps; both are mended here.",
    ),
    "LwF": Strategy(
        decades(-2, 2),
        "Avalanche 0.6 keeps the teacher in train mode: with dropout or BatchNorm its targets are noise in part.",
    ),
}
SLOW_HESSIAN = (
    "Its exact diagonal takes a pass for each parameter of a network with several heads, and equals the Fisher's on "
    "one of linear layers and ReLU."
)
EQUAL_TO_FISHER = ("Hessian", "GGN")  # their diagonals, on a ReLU network with cross-entropy: one policy stands for all
BATCHED = "batched emp. Fisher"
POLICIES = ("accumulate", "merge", "refresh")
DIAGONAL = {
    f"CurvatureEWC {kind}, {policy}": (kind, policy)
    for kind in (*EQUAL_TO_FISHER, "Fisher", "Fisher MC", "empirical Fisher", BATCHED)
    for policy in POLICIES
    if kind not in EQUAL_TO_FISHER or policy == "accumulate"
}
"""Name ↦ (curvature, policy) of CurvatureEWC with the diagonal."""
KRONECKER = {f"CurvatureEWC Fisher, Kronecker, {policy}": policy for policy in POLICIES[:2]}
"""Name ↦ policy of CurvatureEWC with Kronecker factors."""
OURS = {
    name: Strategy(
        SQUARED_MEANS if kind == BATCHED else decades(-1, 5), stores=policy == "refresh",
        unfit={TASK: SLOW_HESSIAN} if kind == "Hessian" else {},
    )
    for name, (kind, policy) in DIAGONAL.items()
} | {
    **{name: Strategy(decades(-1, 5)) for name in KRONECKER},
    "CurvatureEWC Fisher, adaptive": Strategy(stores=True),
    "CurvatureEWC Fisher, Kronecker, adaptive": Strategy(stores=True),
    "GPM": Strategy(),
    "OrthogonalProjection Fisher": Strategy(),
    "SpectralReg": Strategy(decades(-5, -1)),
}
STRATEGIES = AVALANCHES | OURS
MATTER = (
    "CurvatureEWC Fisher, Kronecker, adaptive", "Naive", "EWC", "Replay", "CurvatureEWC Fisher, accumulate", "GPM",
    "DER++",
)  # fmt: skip
"""Those that figures colour and label."""
SHOWN = (*MATTER, "Cumulative", "GEM", "LwF", "SI fixed", "CurvatureEWC Fisher, merge")
"""Those that stand for all where there is no room for them, in figures and in TensorBoard, the first ones first."""


MAIN = (
    "Naive", "JointTraining", "Replay", "DER++", "EWC", "LwF", "CurvatureEWC Fisher, accumulate",
    "CurvatureEWC Fisher, merge", "CurvatureEWC Fisher, Kronecker, adaptive", "GPM",
)  # fmt: skip
"""The ten that matter: the bounds, what is known best, and what this package adds."""
ALL = "all"
WILD = re.compile(r"[*?\[]")


def chosen(scenario: str, asked: Sequence[str]) -> list[str]:
    """The strategies that are asked for, each once: by name, by the beginning of one name alone, by a pattern
    (``'CurvatureEWC*'``), or as `ALL`; without any, `MAIN`. Of patterns, `ALL` and `MAIN` only those that run in the
    scenario.

    Raises UsageError for a word that is none of these, with the names that come near, and for a strategy that does not
    run in the scenario.
    """
    return [*dict.fromkeys(name for word in asked or MAIN for name in _meant(word, scenario, optional=not asked))]


def _meant(word: str, scenario: str, optional: bool) -> list[str]:
    """The strategies that a word stands for."""
    if word == ALL or WILD.search(word):
        matching = [name for name in STRATEGIES if word == ALL or fnmatchcase(name, word)]
        fit = [name for name in matching if scenario in STRATEGIES[name].scenarios]
        if not matching:
            raise UsageError(unknown("strategy", word, STRATEGIES))
        if not fit:
            raise UsageError(f"none of {'; '.join(matching)} runs {scenario}-incrementally.")
        return fit
    name = _named(word)
    reason = STRATEGIES[name].unfit.get(scenario)
    if reason and not optional:
        raise UsageError(f"strategy '{name}' does not run {scenario}-incrementally: {reason}")
    return [] if reason else [name]


def _named(word: str) -> str:
    """The strategy of that name, or the only one whose name begins so. Raises UsageError where there is none, and where
    there are several."""
    begun = [name for name in STRATEGIES if word and name.startswith(word)]
    if word in STRATEGIES or len(begun) == 1:
        return word if word in STRATEGIES else begun[0]
    if begun:
        lines = [f"{len(begun)} strategies begin with '{word}':", *(f"  {name}" for name in begun)]
        raise UsageError("\n".join([*lines, f"Give one of these names, or take them all: --strategy '{word}*'."]))
    raise UsageError(unknown("strategy", word, STRATEGIES))
