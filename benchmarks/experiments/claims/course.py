"""How a row learns its tasks, what it keeps of them, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv import Curvature, Diagonal, EmpiricalRisk, Fisher, QuadraticModel, estimate
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.data import CLASSES, FASHION
from benchmarks.experiments.languages.gpt import Adapted, merged
from benchmarks.harness.experiment import Record
from benchmarks.networks import mlp
from benchmarks.streams.features import FeatureMap, Features, class_order
from benchmarks.streams.scenario import CLASS, DOMAIN, TASK
from benchmarks.training import mean

if TYPE_CHECKING:
    from benchmarks.data import Images

LOOKS = (10, 20, 50, 100, 200)  # steps of the first task after which kinds are looked at
ACCURACY = {TASK: ("own classes", "all classes"), CLASS: ("all classes",), DOMAIN: ("both classes",)}
"""What is asked at the end in each scenario: the class among those of its task, or among all."""

Data = tuple[Float[Tensor, "N d"], Int[Tensor, "N"]]


@dataclass(frozen=True)
class Pixels:
    """Images as vectors, normalised as Avalanche normalises Fashion-MNIST."""

    width: ClassVar[int] = 784

    def of(self, images: Images) -> Float[Tensor, "N d"]:
        return images.vectors(*FASHION)


@dataclass(frozen=True)
class Columns:
    """The outputs of the classes from `first` to before `end`."""

    first: int
    end: int

    def __call__(self, model: Any, inputs: Tensor) -> Float[Tensor, "N n"]:
        return model(inputs)[:, self.first : self.end]


@dataclass(frozen=True)
class Setting:
    """Tasks of so many classes, of `train` images each, `steps` steps of a new Adam a task. ReLU layers of the widths
    `hidden`; with `rank` the first stays as it is drawn, and B A of that rank is added to it (Hu et al. 2021).

    The loss compares the outputs of the task's own classes (TASK), as with a head for each task, those of all classes
    (CLASS), or the two that all tasks share (DOMAIN). With `held_out` the last so many training images of each class
    are tested on.
    """

    map: FeatureMap
    scenario: str
    tasks: tuple[int, ...] = (2, 2, 2, 2, 2)
    hidden: tuple[int, ...] = (100, 100)
    rank: int | None = None
    images: str = "fashion"
    train: int = 400
    test: int = 200
    steps: int = 200
    batch: int = 50
    rate: float = 1e-3
    held_out: int = 0

    @property
    def outputs(self) -> int:
        return 2 if self.scenario == DOMAIN else CLASSES

    def columns(self, number: int) -> Columns:
        """The outputs that the loss of task `number`, from 1, compares."""
        end = sum(self.tasks[:number])
        return Columns(end - self.tasks[number - 1], end) if self.scenario == TASK else Columns(0, self.outputs)

    def build(self, inputs: int) -> nn.Sequential:
        """A network with all outputs, drawn from torch's current random state."""
        model = mlp(inputs, *self.hidden, self.outputs)
        if self.rank is not None:
            model[0] = Adapted(cast("nn.Linear", model[0]), self.rank)
        return model

    def compared(self, outputs: Float[Tensor, "n C"], classes: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """Outputs with −∞ for those that are not compared."""
        if self.scenario != TASK:
            return outputs
        task = torch.arange(len(self.tasks)).repeat_interleave(torch.tensor(self.tasks))
        return outputs.masked_fill(task != task[classes, None], -torch.inf)


@dataclass(frozen=True)
class PublicCode:
    """What the public code of EWC-DR does besides: importance is that of the outputs of all classes known, each entry
    is cut at `cap`, and the mean over tasks is taken, around the newest weights."""

    cap: float = 1e-4

    def added(self, past: QuadraticModel | None, new: QuadraticModel, classes: Sequence[int]) -> QuadraticModel:
        """The mean over tasks of so many classes, of which `new` is the last."""
        share = classes[-1] / sum(classes)
        cut = replace(new, curvature=new.curvature.map_spectrum(lambda values: values.clamp(max=self.cap)))
        return added(None if past is None else past.scaled(1 - share), cut.scaled(share))


def sequence(setting: Setting, seed: int, root: Path | None) -> tuple[list[Data], list[Data]]:
    """The training and the test examples of each task; classes are named in the order in which they come."""
    train, test = Features(setting.images, setting.map, setting.train, setting.test).read(root)
    order = class_order(CLASSES, seed)
    names = torch.empty_like(order)
    names[order] = torch.arange(CLASSES) % setting.outputs
    if setting.held_out:
        last = torch.zeros(len(train[1]), dtype=torch.bool)
        for c in range(CLASSES):
            last[(train[1] == c).nonzero().flatten()[-setting.held_out :]] = True
        test, train = ((train[0][at], train[1][at]) for at in (last, ~last))
    parts = [
        [(x[at], names[y[at]]) for some in order.split(setting.tasks) for at in [torch.isin(y, some)]]
        for x, y in (train, test)
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
        risk = risk_of(with_whole(model) if whole else model, setting, data, number, code)
        yield {"metric": "confidence", "value": confidence(risk), "step": number}
        if kind is not None and number < len(tasks):
            found = estimate(kind, Diagonal(), risk)
            yield {"metric": "trace", "value": found.curvature.trace(), "step": number}
            if code is not None:
                values = diagonal_of(found)
                yield {"metric": "cut", "value": float((values > code.cap).sum() / (values > 0).sum()), "step": number}
            past = added(past, found) if code is None else code.added(past, found, setting.tasks[:number])
            penalty = Penalty(past, strength)
    yield from accuracies(model, setting, tests)


def at_once(setting: Setting, tasks: Sequence[Data], tests: Sequence[Data], *, every: bool) -> Iterator[Record]:
    """All tasks as one, with as many steps in all; with `every` the loss compares all outputs."""
    x, y = (torch.cat(parts) for parts in zip(*tasks))
    model = setting.build(x.shape[1])
    trained = replace(setting, steps=setting.steps * len(tasks), scenario=CLASS if every else setting.scenario)
    for _ in fit(model, (x, y), trained, None):
        pass
    yield from accuracies(model, setting, tests)


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
        loss = F.cross_entropy(setting.compared(model(x[at]), y[at]), y[at])
        (loss if term is None else loss + term(model)).backward()
        optimizer.step()
        yield step


def _term(penalty: Penalty | None, whole: bool) -> Callable[[nn.Module], Tensor] | None:
    return None if penalty is None else (lambda model: of_whole(penalty, model)) if whole else penalty


def of_whole(penalty: Penalty, model: nn.Module) -> Tensor:
    """λ q(W + B A, head), with its gradient in B, A and the head: that of ⟨∇q, ·⟩ with ∇q constant."""
    adapted = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, Adapted)}
    weights = penalty.space.cut(dict(model.named_parameters()) | adapted)
    slopes = penalty.gradients([weight.detach() for weight in weights])
    value = penalty.strength * penalty.last(slopes)
    along = torch.stack([(slope * weight).sum() for slope, weight in zip(slopes, weights)]).sum()
    return value + along - along.detach()


def with_whole(model: nn.Sequential) -> nn.Module:
    """A copy in which W + B A is one weight, which is trained like the head."""
    plain = merged(model)
    list(plain.children())[-1].requires_grad_(True)
    return plain


def risk_of(
    model: nn.Module, setting: Setting, data: Data, number: int, code: PublicCode | None = None
) -> EmpiricalRisk:
    """The loss on the examples of task `number`; with `code` over the outputs of all classes known by then."""
    (x, y), columns = data, setting.columns(number)
    if code is not None:
        columns = Columns(0, columns.end)
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y - columns.first)], forward=columns)


def added(past: QuadraticModel | None, new: QuadraticModel) -> QuadraticModel:
    """The sum of both curvatures at the newest anchor, as `Merge()` has it."""
    return new if past is None else replace(new, curvature=past.curvature.plus(new.curvature))


def diagonal_of(model: QuadraticModel) -> Float[Tensor, "P"]:
    """The entries of a curvature that is diagonal, as C 1."""
    return model.curvature.product(torch.ones_like(model.anchor))


@torch.no_grad()
def confidence(risk: EmpiricalRisk) -> float:
    """The mean probability of the observed class."""
    return mean([float(risk.outputs(x).softmax(1).gather(1, y[:, None]).mean()) for x, y in risk])


def looks(kinds: Mapping[str, Curvature], risk: EmpiricalRisk, step: int) -> Iterator[Record]:
    """Trace of each kind, cosine of its diagonal with that of the exact Fisher, and the confidence."""
    exact = diagonal_of(estimate(Fisher(), Diagonal(), risk))
    yield {"metric": "look/confidence", "value": confidence(risk), "step": step}
    for name, kind in kinds.items():
        values = diagonal_of(estimate(kind, Diagonal(), risk))
        yield {"metric": "look/trace", "value": float(values.sum()), "step": step, "kind": name}
        cosine = float(F.cosine_similarity(values.double(), exact.double(), dim=0, eps=0.0))
        yield {"metric": "look/cosine", "value": cosine, "step": step, "kind": name}


@torch.no_grad()
def accuracies(model: nn.Module, setting: Setting, tests: Sequence[Data]) -> Iterator[Record]:
    """What `ACCURACY` says: among a task's own classes, in the mean over tasks; else over all test images."""
    found = [(model(x), y) for x, y in tests]
    right = [(setting.compared(z, y).argmax(1) == y).float() for z, y in found]
    own, *among_all = ACCURACY[setting.scenario]
    yield {"metric": own, "value": mean([float(part.mean()) for part in right])}
    for name in among_all:
        outputs, classes = (torch.cat(part) for part in zip(*found))
        yield {"metric": name, "value": float((outputs.argmax(1) == classes).float().mean())}
