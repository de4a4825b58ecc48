"""How much of a first task each structure keeps, on four models, at a strength chosen on another seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from avalanche_curv import (
    EKFAC,
    Accumulate,
    Curvature,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Fisher,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    Past,
    Rank,
    Structure,
)
from avalanche_curv.core import NonFiniteCurvatureError
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.data import ALL, read
from benchmarks.experiments.cost.models import MLP, Classifier, ConvNet, Transformer
from benchmarks.harness import Context, Record, Results
from benchmarks.harness.options import positive
from benchmarks.harness.tuning import FIRST_SEED, SelfTuned, TunedOptions, best
from benchmarks.strategies import decades
from benchmarks.training import summary

NAIVE, AT_ONCE = "Naive", "all at once"
HELD_OUT = 300  # training images, of 1,437
MODELS: dict[str, tuple[Classifier, float, int]] = {  # by their label in `cost`: Adam's rate, and the steps of a task
    "MLP 64-12-12-10": (MLP(64, 12), 1e-2, 100),
    "MLP 784-400-400-10": (MLP(784, 400), 1e-3, 100),
    "conv net": (ConvNet(28, (32, 64), 480), 1e-3, 100),
    "vision transformer": (Transformer(32, 8, 2, 64, 128), 1e-3, 150),
}
STRUCTURES: dict[str, Structure] = {
    "Diagonal()": Diagonal(),
    "Kronecker()": Kronecker(),
    "EKFAC()": EKFAC(),
    "LowRank(Rank(10))": LowRank(Rank(10)),
    "MatrixFree(fraction=0.1)": MatrixFree(fraction=0.1),
    "Dense()": Dense(),
}
GRIDS = {name: decades(0, 5 if name == "Diagonal()" else 3) for name in STRUCTURES}
"""The strengths that are tried, wide enough that the best is none of the ends; for a diagonal two decades more."""
MOST = 64 * 2**20  # bytes of a matrix that is still tried
SLOW = 5.0


@dataclass(frozen=True)
class Setting:
    """Permuted digits: the same 8x8 images in each task, their pixels in another order, enlarged to what a model takes.
    `held_out` of the training images are tested on in place of the test images, in tuning."""

    rate: float
    steps: int
    tasks: int = 2
    batch: int = 32
    held_out: int = 0


@dataclass(frozen=True)
class Config:
    """A model, and what is kept of its past tasks: nothing (`NAIVE`), or the curvature in a structure. With `AT_ONCE`
    all tasks are one."""

    label: str
    model: str
    family: Classifier
    method: str
    setting: Setting
    structure: Structure | None = None
    strength: float | None = None
    curvature: Curvature = Fisher(samples=1, seed=0)  # noqa: RUF009  a frozen value
    cost: float = 1.0


@dataclass(frozen=True)
class StructuresOptions(TunedOptions):
    """Three seeds unless asked for others."""

    seeds: Annotated[int, positive()] = 3
    """run seeds 0 to SEEDS - 1"""


class Structures(SelfTuned):
    """Average accuracy after the last task, for each structure that fits on each model, and what its matrix takes.

    First each strength is tried with seed 1000, on images held out of training; the strength of the best accuracy,
    among equal ones the smallest, is the one of the report.
    """

    name = "structures"
    options_type = StructuresOptions

    def settled(self, options: StructuresOptions, results: Results) -> StructuresOptions:
        return replace(options, strengths=tuple(best_strengths(results).items()))

    def configs(self, options: StructuresOptions) -> Sequence[Config]:
        made = []
        for name, (family, rate, steps) in MODELS.items():
            setting = Setting(rate, 3 if options.quick else steps)
            own = family.tiny() if options.quick else family
            plain = Config("", name, own, NAIVE, setting, cost=SLOW if len(family.shape) > 1 else 1.0)
            made += [replace(plain, label=f"{name}, {method}", method=method) for method in (NAIVE, AT_ONCE)]
            space = ParameterSpace.of(own.build())
            made += [
                replace(plain, label=f"{name}, {method}", method=method, structure=structure, strength=GRIDS[method][0])
                for method, structure in STRUCTURES.items()
                if structure.bytes(space, 4) <= MOST
            ]
        if options.tuning:
            tried = slice(1 if options.quick else None)
            return [
                replace(one, label=f"{one.label} at {strength:g}", strength=strength, setting=held_out)
                for one in made
                for held_out in [replace(one.setting, held_out=HELD_OUT)]
                for strength in GRIDS.get(one.method, ())[tried]
            ]
        found = dict(options.strengths)
        return [replace(one, strength=found.get(one.label, one.strength)) for one in made]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        seed += FIRST_SEED if config.setting.held_out else 0
        torch.manual_seed(seed)
        model = config.family.build()
        space = ParameterSpace.of(model)
        for method, structure in STRUCTURES.items():
            yield {"metric": "bytes", "value": structure.bytes(space, 4), "row": method}
        yield {"metric": "parameters", "value": space.size}
        try:
            rows = list(course(config, model, sequence(config, seed)))
        except NonFiniteCurvatureError:
            yield {"metric": "average_accuracy", "value": nan}
            return
        finite = all(parameter.isfinite().all() for parameter in model.parameters())
        found = summary(rows) if finite else {"average_accuracy": nan}
        yield from ({"metric": metric, "value": value} for metric, value in found.items())


def best_strengths(results: Results) -> dict[str, float]:
    """By the label of a report: the strength of the best accuracy, among equal ones the smallest."""
    return best(
        (f"{row['model']}, {row['method']}", row["strength"], one.final("average_accuracy"))
        for one in results.each() for row in [one.first]
    )  # fmt: skip


Data = tuple[Tensor, Tensor]


def sequence(config: Config, seed: int) -> list[tuple[Data, Data]]:
    """(training, test) of each task, in the shape of the model's inputs."""
    images, test = read("digits", ALL, 0, None)
    train_x, train_y, test_x, test_y = images.vectors(), images.targets, test.vectors(), test.targets
    if config.setting.held_out:
        cut = len(train_y) - config.setting.held_out
        train_x, train_y, test_x, test_y = train_x[:cut], train_y[:cut], train_x[cut:], train_y[cut:]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(train_x.shape[1], generator=generator) for _ in range(config.setting.tasks)]
    return [((shown(train_x[:, o], config.family), train_y), (shown(test_x[:, o], config.family), test_y))
            for o in orders]  # fmt: skip


def shown(pixels: Tensor, family: Classifier) -> Tensor:
    """Images of 8x8 pixels as inputs of a model, enlarged to its side."""
    side = family.shape[-1] if len(family.shape) > 1 else round(family.shape[0] ** 0.5)
    images = interpolate(pixels.view(-1, 1, 8, 8), (side, side), mode="bilinear", align_corners=False)
    return images.flatten(1) if len(family.shape) == 1 else images.expand(-1, *family.shape).contiguous()


def course(config: Config, model: nn.Module, tasks: Sequence[tuple[Data, Data]]) -> Iterator[list[float]]:
    """Train on task after task; after each the accuracies on those seen. All at once, there is one row."""
    setting, policy, past = config.setting, Accumulate(), Past()
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.rate)
    if config.method == AT_ONCE:
        x, y = (torch.cat([train[part] for train, _ in tasks]) for part in (0, 1))
        _fit(model, optimizer, (x, y), None, replace(setting, steps=setting.steps * len(tasks)))
        yield [_accuracy(model, test) for _, test in tasks]
        return
    penalty = None
    for number, (train, _) in enumerate(tasks, start=1):
        _fit(model, optimizer, train, penalty, setting)
        yield [_accuracy(model, test) for _, test in tasks[:number]]
        if config.structure is not None and config.strength is not None and number < len(tasks):
            batches = list(zip(*(part.split(128) for part in train)))
            risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)
            past = policy.absorb(past, risk, config.curvature, config.structure)
            penalty = None if past.model is None else Penalty(past.model, config.strength)


def _fit(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, penalty: Penalty | None, s: Setting) -> None:
    model.train()
    x, y = data
    places = torch.cat([torch.randperm(len(y)) for _ in range(s.steps * s.batch // len(y) + 1)])
    for at in places[: s.steps * s.batch].split(s.batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[at]), y[at])
        (loss if penalty is None else loss + penalty(model)).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, data: Data) -> float:
    x, y = data
    return float((model(x).argmax(1) == y).float().mean())


experiment = Structures()
