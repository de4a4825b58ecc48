"""Accuracy at the end of each task against its number: whether a network stays able to learn, and by what.

Lewandowski et al. 2024, with every mitigator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

from torch import nn

from avalanche_curv.plasticity.mitigators import (
    FIRE,
    L2,
    DecoupledIsometry,
    L2Init,
    Mitigator,
    Parseval,
    ReDO,
    Regularizer,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    SpectralRegularizer,
    StreamingEWC,
    Wasserstein,
)
from avalanche_curv.plasticity.mitigators.crelu import CReLU
from avalanche_curv.plasticity.mitigators.schedule import AfterTask
from benchmarks.data import SOURCES, check, has
from benchmarks.experiments.plasticity.learner import run
from benchmarks.experiments.plasticity.settings import CHANGES, NETWORKS, PRESETS, RANDOM, Mlp, Preset, Setting
from benchmarks.harness import Context, Experiment, Options, Record, UsageError
from benchmarks.harness.errors import selected
from benchmarks.harness.options import one_of, positive

NONE, SCRATCH = "none", "from scratch"
PARTS = METHODS, STRENGTHS, LAYER_NORM, EPOCHS = "methods", "strengths", "layer_norm", "epochs"
TRIED = (1e-2, 1e-3, 1e-4)
LONGER = (2, 3)
TRAINED_LONGER = ("SpectralReg", "L2", "L2 init")
QUICK: dict[str, Any] = {"count": 64, "batch": 32, "epochs": 1, "tasks": 2}


@dataclass(frozen=True)
class Method:
    """Plain training with ReLU. `begins_anew`: a new network and optimiser for each task."""

    begins_anew: ClassVar[bool] = False

    def activation(self) -> nn.Module:
        """A new nonlinearity for each layer."""
        return nn.ReLU()

    def mitigator(self, setting: Setting, seed: int) -> Mitigator | None:
        return None

    def begin_task(self, mitigator: Mitigator | None, setting: Setting, number: int, steps: int) -> None:
        """Called before task `number`, from 0, of so many steps: for methods that know when tasks begin."""


@dataclass(frozen=True)
class FromScratch(Method):
    """The reference: what a network that has learned nothing before makes of each task."""

    begins_anew = True


@dataclass(frozen=True)
class Concatenated(Method):
    """CReLU in the place of ReLU after as many units, so that the layers after it read twice as many."""

    def activation(self) -> nn.Module:
        return CReLU()


@dataclass(frozen=True)
class Regularised(Method):
    """A regulariser of all parameters."""

    regularizer: type[Regularizer]
    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return self.regularizer(self.strength)


@dataclass(frozen=True)
class Orthogonal(Method):
    """Parseval regularisation of all layers but the last, as in its source."""

    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return Parseval(self.strength, exclude=(setting.network.output,))


@dataclass(frozen=True)
class Perturbed(Method):
    """θ ← (1 − s) θ + s ε at every step, ε of the spread of initial values: s of the way to a network drawn anew."""

    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return ShrinkAndPerturb(self.strength, self.strength, seed=seed)


@dataclass(frozen=True)
class PerturbedAfterTask(Method):
    """θ ← (1 − s) θ + s ε at the end of each task, which it has to know, s = `part`: the form of Ash & Adams 2020."""

    part: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return ShrinkAndPerturb(self.part, self.part, when=AfterTask(), seed=seed)


@dataclass(frozen=True)
class Isometric(Method):
    """FIRE of all weights at the end of each task, which it has to know: a `part` of the way to isometries."""

    part: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return FIRE(self.part)


@dataclass(frozen=True)
class Decoupled(Method):
    """The isometry step of AdamO on all weights, at the learning rate of Adam."""

    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return DecoupledIsometry(self.strength)


@dataclass(frozen=True)
class SelfNormalized(Method):
    """Self-normalised resets, with thresholds that are renewed as often as five of `small`'s tasks end."""

    rejection: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return SelfNormalizedResets(self.rejection, seed=seed)


@dataclass(frozen=True)
class Recycled(Method):
    """ReDO once a task, after half of its steps (rounded up), so that accuracy is not measured just after."""

    threshold: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return ReDO(self.threshold, every=setting.task_steps, seed=seed)

    def begin_task(self, mitigator: Mitigator | None, setting: Setting, number: int, steps: int) -> None:
        """Set the mitigator's count of steps so that its period ends half-way through a task of any length."""
        if mitigator is not None:
            due = (number + 1) * setting.task_steps
            mitigator.load_state_dict(mitigator.state_dict() | {"steps": due - (steps - steps // 2)})


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
    """None leaves what the preset has; without `part` all parts, without `method` all rows of these."""

    seeds: Annotated[int, positive()] = 3
    """run seeds 0 to SEEDS - 1"""
    preset: Annotated[str, one_of("preset", PRESETS)] = "small"
    """data set, sizes and network"""
    change: Annotated[str, one_of("change", CHANGES)] = RANDOM
    """what is new in each task"""
    network: Annotated[str | None, one_of("network", NETWORKS)] = None
    """default: that of the preset"""
    tasks: Annotated[int | None, positive()] = None
    """so many tasks instead of the preset's"""
    epochs: Annotated[int | None, positive()] = None
    """so many epochs of each task"""
    examples: Annotated[int | None, positive()] = None
    """the first N images only"""
    part: Annotated[str | None, one_of("part", PARTS)] = None
    """default: all"""
    method: tuple[str, ...] = ()
    """one row, by its label; repeatable"""


class Plasticity(Experiment):
    """Can a network still learn its last task as well as its first, and as well as one that begins anew?"""

    name = "plasticity"
    options_type = PlasticityOptions

    def variant(self, options: PlasticityOptions) -> str:
        chosen = (options.preset, options.change if options.change != RANDOM else "", options.network or "")
        return "-".join(part for part in chosen if part)

    def configs(self, options: PlasticityOptions) -> Sequence[Config]:
        parts = (options.part,) if options.part else PARTS
        strength = PRESETS[options.preset].strength
        known = {config.label: config for config in rows(setting_for(options), strength, parts, options.quick)}
        return selected("method", known, options.method or None)

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        return run(config, seed, context)


def setting_for(options: PlasticityOptions) -> Setting:
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
    asked: dict[str, Any] = {"tasks": options.tasks, "epochs": options.epochs, "count": options.examples}
    return replace(setting, **(QUICK if options.quick else {}) | {k: v for k, v in asked.items() if v is not None})


def rows(setting: Setting, strength: float, parts: Sequence[str], quick: bool) -> list[Config]:
    """The configurations of the parts: every method at one strength, the regularisers at others, all with LayerNorm,
    some for more epochs; with `quick`, few of all but the first part.

    LayerNorm is for the multilayer perceptron; others have norm layers.
    """
    makers = regularisers()

    def regularised(name: str, s: float, part: str) -> Config:
        return Config(f"{name} {s:g}", makers[name](s), setting, part, name)

    others: dict[str, Method] = {"shrink & perturb 0.5 after each task": PerturbedAfterTask(0.5)}
    others |= {f"ReDO {threshold:g}": Recycled(threshold) for threshold in (0.025, 0.1)}
    others |= {f"SNR {rejection:g}": SelfNormalized(rejection) for rejection in (0.02, 0.1)}
    others |= {f"FIRE {part:g}": Isometric(part) for part in (0.25, 0.5, 1)}
    others |= {f"AdamO {strength:g}": Decoupled(strength) for strength in (1e-2, 1e-1, 1)}
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
