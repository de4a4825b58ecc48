"""How a row learns its tasks, what it keeps of them, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv import Curvature, Diagonal, EmpiricalRisk, Fisher, QuadraticModel, estimate
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.data import CLASSES, FASHION
from benchmarks.experiments.languages.gpt import Adapted, merged
from benchmarks.experiments.languages.methods import Merged
from benchmarks.harness.experiment import Record
from benchmarks.networks import mlp
from benchmarks.streams.features import FeatureMap, Features, class_order
from benchmarks.training import mean

if TYPE_CHECKING:
    from benchmarks.data import Images

PAIR = 2  # classes of a task
LOOKS = (10, 20, 50, 100, 200, 300)  # steps of the first task after which all kinds are looked at
TASK, CLASS = "accuracy_task", "accuracy_class"

Data = tuple[Float[Tensor, "N d"], Int[Tensor, "N"]]


@dataclass(frozen=True)
class Pixels:
    """Images as vectors, normalised as Avalanche normalises Fashion-MNIST."""

    width: ClassVar[int] = 784

    def of(self, images: Images) -> Float[Tensor, "N d"]:
        return images.vectors(*FASHION)


@dataclass(frozen=True)
class Setting:
    """Two classes a task, of `train` images each, `steps` steps of a new Adam a task. ReLU layers of the widths
    `hidden`; with `rank` the first stays as it is drawn, and B A of that rank is added to it (Hu et al. 2021).

    With `own` the loss compares the outputs of the task's own classes, as with a head for each task; else all ten. With
    `held_out` the last so many training images of each class are tested on.
    """

    map: FeatureMap
    own: bool
    hidden: tuple[int, ...] = (100, 100)
    rank: int | None = None
    images: str = "fashion"
    train: int = 400
    test: int = 200
    steps: int = 300
    batch: int = 50
    rate: float = 1e-3
    held_out: int = 0

    def build(self, inputs: int) -> nn.Sequential:
        """A network with an output for each class, drawn from torch's current random state."""
        model = mlp(inputs, *self.hidden, CLASSES)
        if self.rank is not None:
            model[0] = Adapted(model[0], self.rank)
        return model

    def loss(self, outputs: Float[Tensor, "n C"], classes: Int[Tensor, "n"]) -> Tensor:
        """Cross-entropy over the outputs that are compared."""
        if not self.own:
            return F.cross_entropy(outputs, classes)
        pairs = outputs.view(len(outputs), -1, PAIR)
        return F.cross_entropy(pairs[torch.arange(len(outputs)), classes // PAIR], classes % PAIR)


@dataclass(frozen=True)
class Columns:
    """The outputs of the classes from `first` to before `end`."""

    first: int
    end: int

    def __call__(self, model: Any, inputs: Tensor) -> Float[Tensor, "N n"]:
        return model(inputs)[:, self.first : self.end]


@dataclass(frozen=True)
class PublicCode:
    """What the public code of EWC-DR does besides: importance is that of the outputs of all classes known, each entry
    is cut at `cap`, and the mean over tasks is taken, around the newest weights."""

    cap: float = 1e-4


def sequence(setting: Setting, seed: int, root: Path | None) -> tuple[list[Data], list[Data]]:
    """The training and the test examples of each task; classes are named in the order in which they come."""
    train, test = Features(setting.images, setting.map, setting.train, setting.test).read(root)
    order = class_order(CLASSES, seed)
    names = torch.empty_like(order)
    names[order] = torch.arange(CLASSES)
    if setting.held_out:
        last = torch.zeros(len(train[1]), dtype=torch.bool)
        for c in range(CLASSES):
            last[(train[1] == c).nonzero().flatten()[-setting.held_out :]] = True
        test, train = ((train[0][at], train[1][at]) for at in (last, ~last))
    parts = [
        [(x[at], names[y[at]]) for pair in order.split(PAIR) for at in [torch.isin(y, pair)]] for x, y in (train, test)
    ]
    return parts[0], parts[1]


def learn(
    setting: Setting, tasks: Sequence[Data], tests: Sequence[Data], *, kind: Curvature | None = None,
    strength: float = 0.0, code: PublicCode | None = None, whole: bool = False, kinds: Mapping[str, Curvature] = {},
) -> Iterator[Record]:
    """Learn task after task. Records: of each task (its number is the step) the mean confidence in the observed class
    at its end and the trace of its curvature, and the accuracies at the end.

    `whole`: the curvature is that of the weights W + B A in place of A and B. Of `kinds` are recorded, during the first
    task, the trace and the cosine between their diagonal and that of the exact Fisher.
    """
    model, past, penalty = setting.build(tasks[0][0].shape[1]), None, None
    for number, data in enumerate(tasks, start=1):
        for step in fit(model, data, setting, _term(penalty, whole)):
            if number == 1 and step in LOOKS and kinds:
                yield from looks(kinds, risk_of(model, setting, data, number), step)
        risk = risk_of(merged(model) if whole else model, setting, data, number, code)
        yield {"metric": "confidence", "value": confidence(risk), "step": number}
        if kind is not None and number < len(tasks):
            found = estimate(kind, Diagonal(), risk)
            yield {"metric": "trace", "value": found.curvature.trace(), "step": number}
            if code is not None:
                values = found.curvature.values
                yield {"metric": "cut", "value": float((values > code.cap).sum() / (values > 0).sum()), "step": number}
            past = added(past, found, number, code)
            penalty = Penalty(past, strength)
    yield from accuracies(model, tests)


def at_once(setting: Setting, tasks: Sequence[Data], tests: Sequence[Data]) -> Iterator[Record]:
    """All tasks as one, with as many steps in all."""
    x, y = (torch.cat(parts) for parts in zip(*tasks))
    model = setting.build(x.shape[1])
    for _ in fit(model, (x, y), replace(setting, steps=setting.steps * len(tasks)), None):
        pass
    yield from accuracies(model, tests)


def fit(
    model: nn.Module, data: Data, setting: Setting, term: Callable[[nn.Module], Tensor] | None
) -> Iterator[int]:
    """Train on a task; after each step its number, from 1."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=setting.rate, fused=True)
    x, y = data
    count = setting.steps * setting.batch
    places = torch.cat([torch.randperm(len(y)) for _ in range(count // len(y) + 1)])[:count]
    for step, at in enumerate(places.split(setting.batch), start=1):
        optimizer.zero_grad()
        loss = setting.loss(model(x[at]), y[at])
        (loss if term is None else loss + term(model)).backward()
        optimizer.step()
        yield step


def _term(penalty: Penalty | None, whole: bool) -> Callable[[nn.Module], Tensor] | None:
    if penalty is None:
        return None
    return (lambda model: Merged().term(penalty, model)) if whole else penalty


def risk_of(
    model: nn.Module, setting: Setting, data: Data, number: int, code: PublicCode | None = None
) -> EmpiricalRisk:
    """The loss on the examples of task `number`, over the outputs of its own classes, of all, or with `code` of those
    known by then."""
    last = PAIR * number
    columns = Columns(0 if code else last - PAIR, last) if setting.own else Columns(0, CLASSES)
    x, y = data
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y - columns.first)], forward=columns)


def added(past: QuadraticModel | None, new: QuadraticModel, number: int, code: PublicCode | None) -> QuadraticModel:
    """The sum of both curvatures at the newest anchor, as `Merge()` has it; with `code` the mean over `number` tasks,
    of entries cut at its cap."""
    kept, share = (1.0, 1.0) if code is None else (1 - 1 / number, 1 / number)
    matrix = new.curvature
    if code is not None:
        matrix = matrix.map_spectrum(lambda values: values.clamp(max=code.cap)).scaled(share)
    return replace(new, curvature=matrix if past is None else past.curvature.scaled(kept).plus(matrix))


@torch.no_grad()
def confidence(risk: EmpiricalRisk) -> float:
    """The mean probability of the observed class."""
    return mean([float(risk.outputs(x).softmax(1).gather(1, y[:, None]).mean()) for x, y in risk])


def looks(kinds: Mapping[str, Curvature], risk: EmpiricalRisk, step: int) -> Iterator[Record]:
    """Trace of each kind, cosine of its diagonal with that of the exact Fisher, and the confidence."""
    exact = estimate(Fisher(), Diagonal(), risk).curvature.values
    yield {"metric": "look/confidence", "value": confidence(risk), "step": step}
    for name, kind in kinds.items():
        values = estimate(kind, Diagonal(), risk).curvature.values
        yield {"metric": "look/trace", "value": float(values.sum()), "step": step, "kind": name}
        cosine = float(F.cosine_similarity(values.double(), exact.double(), dim=0, eps=0.0))
        yield {"metric": "look/cosine", "value": cosine, "step": step, "kind": name}


@torch.no_grad()
def accuracies(model: nn.Module, tests: Sequence[Data]) -> Iterator[Record]:
    """The mean over tasks of the part of test examples whose class is found among those of their task, and among
    all."""
    outputs = [(model(x), y) for x, y in tests]
    among_own = [
        float((z.view(len(z), -1, PAIR)[torch.arange(len(z)), y // PAIR].argmax(1) == y % PAIR).float().mean())
        for z, y in outputs
    ]
    yield {"metric": TASK, "value": mean(among_own)}
    yield {"metric": CLASS, "value": mean([float((z.argmax(1) == y).float().mean()) for z, y in outputs])}
