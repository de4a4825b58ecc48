"""Figure 2 of "An Optimization View of EWC": the Hessian's diagonal in the place of squared gradients, each tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from avalanche_curv import Curvature
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method

ACTIVATIONS = ("ReLU", "Tanh")
REFERENCE = "Fisher"
PLAIN = "no penalty"
SQUARED = "squared batch gradient"
BATCH = 64
FRACTION = 0.25  # of an experience's training examples: those that its curvature is estimated on


@dataclass(frozen=True)
class Setting:
    """What all methods share. `activation` is the name of a module of torch; each of the `examples` drawn of an
    experience is seen once."""

    activation: str
    stream: str = "permuted_mnist"
    experiences: int = 5
    examples: int = 12_800
    hidden: int = 100
    steps: int = 200
    batch: int = BATCH
    rate: float = 3e-3


@dataclass(frozen=True)
class Config:
    """One method on one network; the curvatures `compared` are measured after the first experience."""

    label: str
    method: Method
    setting: Setting
    compared: tuple[tuple[str, Curvature], ...] = ()


STRENGTHS = {  # `run tune --target ewc_hessian --seeds 2`
    ("ReLU", SQUARED): 1000.0,
    ("ReLU", "empirical Fisher"): 10.0,
    ("ReLU", "Fisher"): 10.0,
    ("ReLU", "Hessian"): 10.0,  # the Fisher's, which it equals there
    ("Tanh", SQUARED): 300.0,
    ("Tanh", "empirical Fisher"): 10.0,
    ("Tanh", "Fisher"): 3.0,
    ("Tanh", "Hessian"): 3.0,
}
BORROWED = f"{SQUARED} at the Hessian's λ"  # the note's comparison: one strength for both


class EwcHessian(Experiment):
    """Accuracy with each matrix in the penalty, with ReLU and with tanh, and per-seed differences to the Fisher."""

    name = "ewc_hessian"

    def configs(self, options: Options) -> Sequence[Config]:
        return [config for activation in ACTIVATIONS for config in _of(activation, setting_for(activation, options))]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        from benchmarks.experiments.ewc_hessian.run import run

        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        from benchmarks.experiments.ewc_hessian.report import report

        return report(results, out)


def _of(activation: str, setting: Setting) -> list[Config]:
    """The rows of one network."""
    from benchmarks.methods import Plain

    kinds = curvatures()
    borrowed = penalised(STRENGTHS[activation, "Hessian"], kinds[SQUARED])
    return [
        Config(f"{activation}, {PLAIN}", Plain(), setting, tuple(kinds.items())),
        *(penalised_config(activation, name, STRENGTHS[activation, name], setting) for name in kinds),
        Config(f"{activation}, {BORROWED}", borrowed, setting),
    ]


def penalised_config(activation: str, name: str, strength: float, setting: Setting) -> Config:
    """EWC with the curvature of that name."""
    return Config(f"{activation}, {name}", penalised(strength, curvatures()[name]), setting)


def curvatures() -> dict[str, Curvature]:
    """The matrices of the comparison. Negative entries of the Hessian become zero, which is the nearest penalty that is
    bounded below; their absolute values would hold parameters back whose moves lower the second-order loss."""
    from avalanche_curv import BatchedEmpiricalFisher, Clip, EmpiricalFisher, Fisher, Hessian

    return {
        SQUARED: BatchedEmpiricalFisher(BATCH),
        "empirical Fisher": EmpiricalFisher(),
        "Fisher": Fisher(),
        "Hessian": Hessian(psd=Clip()),
    }


def penalised(strength: float, kind: Curvature) -> Method:
    """EWC with the diagonal of a kind, one anchor an experience."""
    from avalanche_curv import Accumulate, Diagonal
    from benchmarks.methods import Ours

    return Ours(strength, kind, Diagonal(), Accumulate(fraction=FRACTION))


def setting_for(activation: str, options: Any) -> Setting:
    """Permuted MNIST; with `quick`, a few steps on two experiences of digits that need no download."""
    if options.quick:
        return Setting(activation, "permuted_digits", experiences=2, hidden=10, steps=5)
    STREAMS["permuted_mnist"].check(options.dataset_root)
    return Setting(activation)


experiment = EwcHessian()
