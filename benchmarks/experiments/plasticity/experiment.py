"""Lewandowski et al. 2024: accuracy at the end of each task against its number, for every mitigator."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.data import SOURCES, check, has
from benchmarks.experiments.plasticity.networks import Mlp
from benchmarks.experiments.plasticity.presets import (
    CHANGES,
    NETWORKS,
    PRESETS,
    RANDOM,
    Preset,
    Setting,
)
from benchmarks.experiments.plasticity.report import NONE, SCRATCH, report
from benchmarks.harness import Experiment, Options, UsageError, one_of, positive
from benchmarks.harness.errors import selected
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from benchmarks.experiments.plasticity.methods import Method
    from benchmarks.harness.results import Results

PARTS = METHODS, STRENGTHS, LAYER_NORM, EPOCHS = "methods", "strengths", "layer_norm", "epochs"
TRIED = (1e-2, 1e-3, 1e-4)
LONGER = (2, 3)
TRAINED_LONGER = ("SpectralReg", "L2", "L2 init")
QUICK = {"count": 64, "batch": 32, "epochs": 1, "tasks": 2}


@dataclass(frozen=True)
class Config:
    """One method in one setting, in one part of the grid. `row` names the method with its strength, and `regulariser`
    the method alone where it is tried at several strengths."""

    row: str
    method: Method
    setting: Setting
    part: str
    regulariser: str | None = None

    @property
    def label(self) -> str:
        endings = {LAYER_NORM: ", LayerNorm", EPOCHS: f", {self.setting.epochs} epochs"}
        return self.row + endings.get(self.part, "")

    @property
    def cost(self) -> float:
        return float(self.setting.task_steps * self.setting.tasks)


@dataclass(frozen=True)
class PlasticityOptions(Options):
    """None leaves what the preset has; `part` None is all parts, `method` None all rows of these."""

    preset: str = "small"
    change: str = RANDOM
    network: str | None = None
    tasks: int | None = None
    epochs: int | None = None
    examples: int | None = None
    part: str | None = None
    method: Sequence[str] | None = None


class Plasticity(Experiment):
    """Can a network still learn its last task as well as its first, and as well as one that begins anew?"""

    name = "plasticity"
    options_type = PlasticityOptions

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--preset", type=one_of("preset", PRESETS), default="small", help="default: small")
        parser.add_argument("--change", type=one_of("change", CHANGES), default=RANDOM, help=f"default: {RANDOM}")
        parser.add_argument("--network", type=one_of("network", NETWORKS), help="default: that of the preset")
        parser.add_argument("--tasks", type=positive, metavar="N", help="so many tasks instead of the preset's")
        parser.add_argument("--epochs", type=positive, metavar="N", help="so many epochs of each task")
        parser.add_argument("--examples", type=positive, metavar="N", help="the first N images only")
        parser.add_argument("--part", type=one_of("part", PARTS), help="default: all")
        parser.add_argument("--method", action="append", metavar="LABEL", help="one row, by its label; repeatable")
        parser.set_defaults(seeds=3)

    def variant(self, options: PlasticityOptions) -> str:
        chosen = (options.preset, options.change if options.change != RANDOM else "", options.network or "")
        return "-".join(part for part in chosen if part)

    def configs(self, options: PlasticityOptions) -> Sequence[Config]:
        parts = (options.part,) if options.part else PARTS
        strength = PRESETS[options.preset].strength
        known = {config.label: config for config in rows(setting_for(options), strength, parts, options.quick)}
        return selected("method", known, options.method)

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.plasticity.learner import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


def setting_for(options: Any) -> Setting:
    """The setting that the options ask for. `small` takes MNIST where it is at hand, and scikit-learn's digits else."""
    preset: Preset = PRESETS[options.preset]
    images = "mnist" if options.preset == "small" and has("mnist", options.dataset_root) else preset.images
    check(images, options.dataset_root)
    network = preset.network if options.network is None else NETWORKS[options.network]
    if SOURCES[preset.images].channels == 1 and not isinstance(network, Mlp):
        raise UsageError(
            f"{options.network} is for colour images, and those of preset '{options.preset}' are grey. Take --preset "
            "cifar10, say, or leave out --network."
        )
    epochs, tasks = preset.random if options.change == RANDOM else preset.other
    setting = Setting(
        images, preset.count, preset.batch, epochs, tasks, network, options.change, validation=preset.validation
    )
    asked = {"tasks": options.tasks, "epochs": options.epochs, "count": options.examples}
    return replace(setting, **(QUICK if options.quick else {}) | {k: v for k, v in asked.items() if v is not None})


def rows(setting: Setting, strength: float, parts: Sequence[str], quick: bool) -> list[Config]:
    """The configurations of the parts: every method at one strength, the regularisers at others, all with LayerNorm,
    some for more epochs; with `quick`, few of all but the first part.

    LayerNorm is for the multilayer perceptron; others have norm layers.
    """
    from benchmarks.experiments.plasticity.methods import (
        Concatenated,
        FromScratch,
        Method,
        PerturbedAfterTask,
        Recycled,
    )

    makers = regularisers()

    def regularised(name: str, s: float, part: str) -> Config:
        return Config(f"{name} {s:g}", makers[name](s), setting, part, name)

    others: dict[str, Method] = {"shrink & perturb 0.5 after each task": PerturbedAfterTask(0.5)}
    others |= {f"ReDO {threshold:g}": Recycled(threshold) for threshold in (0.025, 0.1)}
    if isinstance(setting.network, Mlp):
        others["CReLU"] = Concatenated()
    known = [
        *(Config(name, method, setting, METHODS) for name, method in ((NONE, Method()), (SCRATCH, FromScratch()))),
        *(regularised(name, strength, METHODS) for name in makers),
        *(Config(name, method, setting, METHODS) for name, method in others.items()),
    ]
    found = known if METHODS in parts else []
    if STRENGTHS in parts:
        some = [s for s in TRIED if s != strength][: 1 if quick else None]
        found = [*found, *(regularised(name, s, STRENGTHS) for name in [*makers][: 2 if quick else None] for s in some)]
    if LAYER_NORM in parts and isinstance(setting.network, Mlp):
        normed = replace(setting, network=replace(setting.network, layer_norm=True))
        found = [*found, *(replace(c, setting=normed, part=LAYER_NORM) for c in known[: 3 if quick else None])]
    if EPOCHS in parts:
        longer = [replace(setting, epochs=times * setting.epochs) for times in LONGER[: 1 if quick else None]]
        chosen = [c for c in known if c.row == NONE or c.regulariser in TRAINED_LONGER][: 2 if quick else None]
        found = [*found, *(replace(c, setting=long, part=EPOCHS) for c in chosen for long in longer)]
    return found


def regularisers() -> dict[str, Callable[[float], Method]]:
    """The methods that are tried at several strengths."""
    from avalanche_curv.plasticity.mitigators import L2, L2Init, SpectralRegularizer, StreamingEWC, Wasserstein
    from benchmarks.experiments.plasticity.methods import Orthogonal, Perturbed, Regularised

    return {
        "SpectralReg": partial(Regularised, SpectralRegularizer),
        "L2": partial(Regularised, L2),
        "L2 init": partial(Regularised, L2Init),
        "Wasserstein": partial(Regularised, Wasserstein),
        "streaming EWC": partial(Regularised, StreamingEWC),
        "Parseval": Orthogonal,
        "shrink & perturb": Perturbed,
    }


experiment = Plasticity()
