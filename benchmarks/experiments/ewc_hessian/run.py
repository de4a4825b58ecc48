"""One run of the comparison of matrices: a method on a stream, and the matrices beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from avalanche_curv import Diagonal, EmpiricalRisk, estimate
from avalanche_curv.core.curvature.hessian import Hessian
from benchmarks.experiments.ewc_hessian.data import Data, permuted_digits, permuted_mnist
from benchmarks.harness.experiment import Context, Record
from benchmarks.training import TimedEvaluation, Trainer, learner, summary

if TYPE_CHECKING:
    from benchmarks.experiments.ewc_hessian import Config, Setting

STREAMS = {"permuted_mnist": (permuted_mnist, 784), "permuted_digits": (permuted_digits, 64)}
CLASSES = 10


def run(config: Config, seed: int, context: Context) -> list[Record]:
    """Train on all experiences; accuracy on every whole test set after each of them."""
    setting = config.setting
    make, inputs = STREAMS[setting.stream]
    stream = make(setting.experiences, seed, context.dataset_root, setting.examples)
    torch.manual_seed(seed)  # every method starts from the same weights and sees the same batches
    strategy, evaluation = build(config, inputs)
    trainer = Trainer(strategy, evaluation)
    records: list[Record] = []
    for number, found in enumerate(trainer.course(stream.benchmark.train_stream, stream.tests)):
        records += found
        if number == 0:
            records += measured(config, strategy.model, stream.first)
    scalars = summary(trainer.rows) | {"seconds": trainer.seconds}
    scalars["weights"] = float(sum(p.detach().double().sum() for p in strategy.model.parameters()))  # tells equal runs
    return records + [{"metric": name, "value": value} for name, value in scalars.items()]


def build(config: Config, inputs: int) -> tuple[Any, TimedEvaluation]:
    """Naive with the plugins of the method, and nothing measured while it trains."""
    setting = config.setting
    model = network(inputs, setting)
    evaluation = TimedEvaluation(loggers=[])
    strategy = learner(model, setting, config.method.plugins(0), evaluation)
    return strategy, evaluation


def network(inputs: int, setting: Setting) -> nn.Sequential:
    """One hidden layer, drawn from torch's current random state."""
    activation = getattr(nn, setting.activation)()
    return nn.Sequential(nn.Linear(inputs, setting.hidden), activation, nn.Linear(setting.hidden, CLASSES))


def measured(config: Config, model: nn.Module, data: Data) -> Iterator[Record]:
    """The trace of each compared matrix on a part of the data; of a Hessian as it is, its negative entries and its
    distance to the reference."""
    from benchmarks.experiments.ewc_hessian import FRACTION, REFERENCE

    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [data]).subset(FRACTION, seed=0)
    diagonals = {name: diagonal(kind, risk) for name, kind in config.compared}
    for name, values in diagonals.items():
        yield {"metric": "trace", "value": values.sum(), "matrix": name}
        yield {"metric": "negative", "value": (values < 0).double().mean(), "matrix": name}
        gap = (values - diagonals[REFERENCE]).norm() / diagonals[REFERENCE].norm()
        yield {"metric": "gap", "value": gap, "matrix": name}


def diagonal(kind: Any, risk: EmpiricalRisk) -> torch.Tensor:
    """The diagonal, in double precision, of a Hessian before its negative entries are mended."""
    plain = type(kind)() if isinstance(kind, Hessian) else kind
    return estimate(plain, Diagonal(), risk).curvature.tensors()[0].double()
