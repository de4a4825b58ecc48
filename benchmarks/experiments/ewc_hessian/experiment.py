"""Figure 2 of "An Optimization View of EWC": the Hessian's diagonal in the place of squared gradients, each tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.ewc_hessian.report import BORROWED, FRACTION, PLAIN, REFERENCE, SQUARED, report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from avalanche_curv import Curvature, EmpiricalRisk
    from benchmarks.harness.results import Results
    from benchmarks.methods import Method
    from benchmarks.training import Data

BATCH = 64
CLASSES = 10
STRENGTHS = {  # `run tune --target ewc_hessian --seeds 2`
    ("ReLU", SQUARED): 1000.0,
    ("ReLU", "empirical Fisher"): 10.0,
    ("ReLU", REFERENCE): 10.0,
    ("ReLU", "Hessian"): 10.0,  # the Fisher's, which it equals there
    ("Tanh", SQUARED): 300.0,
    ("Tanh", "empirical Fisher"): 10.0,
    ("Tanh", REFERENCE): 3.0,
    ("Tanh", "Hessian"): 3.0,
}


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
    """One method on one network, named by the matrix in its penalty; the curvatures `compared` are measured after the
    first experience."""

    penalty: str
    method: Method
    setting: Setting
    compared: tuple[tuple[str, Curvature], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.setting.activation}, {self.penalty}"


class EwcHessian(Experiment):
    """Accuracy with each matrix in the penalty, with ReLU and with tanh, and per-seed differences to the Fisher."""

    name = "ewc_hessian"

    def configs(self, options: Options) -> Sequence[Config]:
        return [config for activation in ("ReLU", "Tanh") for config in rows(setting_for(activation, options))]

    def run(self, config: Config, seed: int, context: Context) -> Sequence[Record]:
        return run(config, seed, context)

    def report(self, results: Results, out: Path) -> str:
        return report(results, out)


def setting_for(activation: str, options: Options) -> Setting:
    """Permuted MNIST; with `quick`, a few steps on two experiences of digits that need no download."""
    if options.quick:
        return Setting(activation, "permuted_digits", experiences=2, hidden=10, steps=5)
    STREAMS["permuted_mnist"].check(options.dataset_root)
    return Setting(activation)


def rows(setting: Setting) -> list[Config]:
    """The methods on one network, each EWC with a diagonal and one anchor an experience.

    Negative entries of the Hessian become zero, which is the nearest penalty that is bounded below; their absolute
    values would hold parameters back whose moves lower the second-order loss."""
    from avalanche_curv import (
        Accumulate,
        BatchedEmpiricalFisher,
        Clip,
        Diagonal,
        EmpiricalFisher,
        Fisher,
        Hessian,
    )
    from benchmarks.methods import Ours, Plain

    kinds: dict[str, Curvature] = {
        SQUARED: BatchedEmpiricalFisher(BATCH),
        "empirical Fisher": EmpiricalFisher(),
        REFERENCE: Fisher(),
        "Hessian": Hessian(psd=Clip()),
    }

    def penalised(name: str, kind: str, strength_of: str) -> Config:
        strength = STRENGTHS[setting.activation, strength_of]
        return Config(name, Ours(strength, kinds[kind], Diagonal(), Accumulate(fraction=FRACTION)), setting)

    return [
        Config(PLAIN, Plain(), setting, tuple(kinds.items())),
        *(penalised(name, name, name) for name in kinds),
        penalised(BORROWED, SQUARED, "Hessian"),
    ]


def run(config: Config, seed: int, context: Context) -> list[Record]:
    """Train on all experiences; accuracy on every whole test set after each of them."""
    import torch
    from torch import nn

    from benchmarks.experiments.ewc_hessian.data import permuted_digits, permuted_mnist
    from benchmarks.training import TimedEvaluation, Trainer, learner, summary

    setting = config.setting
    make, inputs = {"permuted_mnist": (permuted_mnist, 784), "permuted_digits": (permuted_digits, 64)}[setting.stream]
    stream = make(setting.experiences, seed, context.dataset_root, setting.examples)
    torch.manual_seed(seed)  # every method starts from the same weights and sees the same batches
    activation = getattr(nn, setting.activation)()
    model = nn.Sequential(nn.Linear(inputs, setting.hidden), activation, nn.Linear(setting.hidden, CLASSES))
    evaluation = TimedEvaluation(loggers=[])  # nothing is measured during training
    trainer = Trainer(learner(model, setting, config.method.plugins(0), evaluation), evaluation)
    records: list[Record] = []
    for number, found in enumerate(trainer.course(stream.benchmark.train_stream, stream.tests)):
        records += found
        if number == 0:
            records += measured(config, model, stream.first)
    scalars = summary(trainer.rows) | {"seconds": trainer.seconds}
    scalars["weights"] = float(sum(p.detach().double().sum() for p in model.parameters()))  # tells equal runs
    return records + [{"metric": name, "value": value} for name, value in scalars.items()]


def measured(config: Config, model: nn.Module, data: Data) -> Iterator[Record]:
    """The trace of each compared matrix on a part of the data; of a Hessian as it is, its negative entries and its
    distance to the reference."""
    from torch import nn

    from avalanche_curv import EmpiricalRisk

    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [data]).subset(FRACTION, seed=0)
    diagonals = {name: diagonal(kind, risk) for name, kind in config.compared}
    for name, values in diagonals.items():
        yield {"metric": "trace", "value": values.sum(), "matrix": name}
        yield {"metric": "negative", "value": (values < 0).double().mean(), "matrix": name}
        gap = (values - diagonals[REFERENCE]).norm() / diagonals[REFERENCE].norm()
        yield {"metric": "gap", "value": gap, "matrix": name}


def diagonal(kind: Curvature, risk: EmpiricalRisk) -> Tensor:
    """The diagonal, in double precision, of a Hessian before its negative entries are mended."""
    from avalanche_curv import Diagonal, Hessian, estimate

    plain = Hessian() if isinstance(kind, Hessian) else kind
    return estimate(plain, Diagonal(), risk).curvature.tensors()[0].double()


experiment = EwcHessian()
