"""The Hessian's diagonal against squared gradients in EWC, each at its own strength, on permuted MNIST.

Figure 2 of "An Optimization View of EWC". The examples are those of Avalanche's `PermutedMNIST`, without a transform
for each of them: Avalanche permutes and normalises one image at a time, 65 µs each; here an experience is two tensor
operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avalanche_curv import (
    Accumulate,
    BatchedEmpiricalFisher,
    Clip,
    Curvature,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Hessian,
    estimate,
)
from avalanche_curv.streams import PermutedDigits
from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.data import CLASSES, PIXELS, mnist
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.methods import Method, Ours, Plain
from benchmarks.streams import STREAMS
from benchmarks.training import Data, TimedEvaluation, Trainer, learner, stacked, summary

PLAIN, REFERENCE, SQUARED = "no penalty", "Fisher", "squared batch gradient"
BORROWED = f"{SQUARED} at the Hessian's λ"  # the note's comparison: one strength for both
FRACTION = 0.25  # of an experience's training examples: those that its curvature is estimated on
BATCH = 64
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

    def run(self, config: Config, seed: int, context: Context) -> list[Record]:
        """Train on all experiences; accuracy on every whole test set after each of them."""
        setting = config.setting
        make, inputs = STREAMS_OF_TENSORS[setting.stream]
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


def measured(config: Config, model: nn.Module, data: Data) -> Iterator[Record]:
    """The trace of each compared matrix on a part of the data; of a Hessian as it is, its negative entries and its
    distance to the reference."""
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [data]).subset(FRACTION, seed=0)
    diagonals = {name: diagonal(kind, risk) for name, kind in config.compared}
    for name, values in diagonals.items():
        yield {"metric": "trace", "value": values.sum(), "matrix": name}
        yield {"metric": "negative", "value": (values < 0).double().mean(), "matrix": name}
        gap = (values - diagonals[REFERENCE]).norm() / diagonals[REFERENCE].norm()
        yield {"metric": "gap", "value": gap, "matrix": name}


def diagonal(kind: Curvature, risk: EmpiricalRisk) -> Tensor:
    """The diagonal, in double precision, of a Hessian before its negative entries are mended."""
    plain = Hessian() if isinstance(kind, Hessian) else kind
    return estimate(plain, Diagonal(), risk).curvature.tensors()[0].double()


@dataclass(frozen=True)
class Stream:
    """A benchmark, and what its first experience trains on and all test on as tensors."""

    benchmark: Any
    first: Data
    tests: tuple[Data, ...]


@lru_cache(maxsize=1)  # the runs of one seed follow each other
def permuted_mnist(experiences: int, seed: int, dataset_root: Path | None, examples: int = 60_000) -> Stream:
    """The benchmark of `PermutedMNIST(experiences, seed=seed)`, its inputs as vectors of 784 pixels, with a random part
    of so many training examples in each experience."""
    (x, y), (test_x, test_y) = mnist(dataset_root)
    state = np.random.RandomState(seed)  # the generator that Avalanche draws its permutations from
    orders = [torch.from_numpy(state.permutation(PIXELS)) for _ in range(experiences)]
    parts = [some(len(y), examples, seed, number) for number in range(experiences)]
    splits = [
        (Examples(x[part][:, order], y[part]), Examples(test_x[:, order], test_y))
        for part, order in zip(parts, orders)
    ]
    train, tests = zip(*(((a.inputs, a.targets), (b.inputs, b.targets)) for a, b in splits))
    return Stream(benchmark(splits, [0] * experiences, CLASSES), train[0], tests)


def some(total: int, count: int, seed: int, number: int) -> Tensor:
    """Sorted indices of `count` of so many examples, or of all, for experience `number`."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    return torch.randperm(total, generator=generator)[:count].sort().values


@lru_cache(maxsize=1)
def permuted_digits(experiences: int, seed: int, dataset_root: Path | None, examples: int = 60_000) -> Stream:
    """All digits of scikit-learn, which need no download, for quick runs."""
    found = PermutedDigits(experiences, seed=seed)
    tests = tuple(stacked(experience.dataset) for experience in found.test_stream)
    return Stream(found, stacked(found.train_stream[0].dataset), tests)


STREAMS_OF_TENSORS = {"permuted_mnist": (permuted_mnist, PIXELS), "permuted_digits": (permuted_digits, 64)}
experiment = EwcHessian()
