"""The rows: every method at one strength, the regularisers at others, all with LayerNorm, some for longer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from avalanche_curv.plasticity.mitigators.l2 import L2, L2Init
from avalanche_curv.plasticity.mitigators.spectral import SpectralRegularizer
from avalanche_curv.plasticity.mitigators.streaming_ewc import StreamingEWC
from avalanche_curv.plasticity.mitigators.wasserstein import Wasserstein
from benchmarks.experiments.plasticity.methods import (
    Concatenated,
    FromScratch,
    Method,
    Orthogonal,
    Perturbed,
    PerturbedAfterTask,
    Recycled,
    Regularised,
)
from benchmarks.experiments.plasticity.networks import Mlp
from benchmarks.experiments.plasticity.presets import Setting

STRENGTHS = (1e-2, 1e-3, 1e-4)
NONE, SCRATCH, SPECTRAL, LAYER_NORM = "none", "from scratch", "SpectralReg", "LayerNorm"
REGULARISED: dict[str, Callable[[float], Method]] = {
    SPECTRAL: partial(Regularised, SpectralRegularizer),
    "L2": partial(Regularised, L2),
    "L2 init": partial(Regularised, L2Init),
    "Wasserstein": partial(Regularised, Wasserstein),
    "streaming EWC": partial(Regularised, StreamingEWC),
    "Parseval": Orthogonal,
    "shrink & perturb": Perturbed,
}
LONGER = (2, 3)
TRAINED_LONGER = (SPECTRAL, "L2", "L2 init")

Row = tuple[str, Method, Setting]


def rows(setting: Setting, strength: float, parts: Sequence[str], quick: bool) -> list[Row]:
    """(label, method, setting) of the parts; with `quick`, few of all but the first.

    LayerNorm is for the multilayer perceptron; others have norm layers.
    """
    known = methods(setting, strength)
    found: list[Row] = []
    if "methods" in parts:
        found += [(name, method, setting) for name, method in known.items()]
    if "strengths" in parts:
        others = [s for s in STRENGTHS if s != strength][: 1 if quick else None]
        makers = list(REGULARISED.items())[: 2 if quick else None]
        found += [(named(name, s), make(s), setting) for name, make in makers for s in others]
    if "layer_norm" in parts and isinstance(setting.network, Mlp):
        normed = replace(setting, network=replace(setting.network, layer_norm=True))
        chosen = list(known.items())[: 3 if quick else None]
        found += [(f"{name}, {LAYER_NORM}", method, normed) for name, method in chosen]
    if "epochs" in parts:
        longer = [replace(setting, epochs=times * setting.epochs) for times in LONGER[: 1 if quick else None]]
        names = [NONE, *(named(name, strength) for name in TRAINED_LONGER)][: 2 if quick else None]
        found += [(f"{name}, {long.epochs} epochs", known[name], long) for name in names for long in longer]
    return found


def methods(setting: Setting, strength: float) -> dict[str, Method]:
    """Every method, at one strength where it has one."""
    found: dict[str, Method] = {NONE: Method(), SCRATCH: FromScratch()}
    found |= {named(name, strength): make(strength) for name, make in REGULARISED.items()}
    found["shrink & perturb 0.5 after each task"] = PerturbedAfterTask(0.5)
    found |= {f"ReDO {threshold:g}": Recycled(threshold) for threshold in (0.025, 0.1)}
    return found | ({"CReLU": Concatenated()} if isinstance(setting.network, Mlp) else {})


def named(name: str, strength: float) -> str:
    return f"{name} {strength:g}"
