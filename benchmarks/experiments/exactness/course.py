"""How the tasks of a row are learned, and what its model of the past gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import nan
from pathlib import Path

import torch
from avalanche.training.plugins import EWCPlugin
from jaxtyping import Float, Int
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv import (
    GGN,
    Accumulate,
    Merge,
    ParameterSpace,
    Past,
)
from avalanche_curv.core import NonFiniteCurvatureError
from avalanche_curv.core.quadratic.adaptive import predicted_loss
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.streams._benchmark import benchmark
from benchmarks.experiments.exactness.learner import (
    CLASSES,
    Data,
    Network,
    closed_form,
    fit,
    grow,
    joined,
    last,
    of_squares,
    prior,
    with_one,
)
from benchmarks.experiments.exactness.rows import (
    JOINT,
    LDA,
    MEANS,
    ONLINE,
    PAIR,
    RANDOM,
    RANDOM_UNITS,
    REPLAY,
    SHRINKAGE,
    SQUARED,
    Config,
    Setting,
)
from benchmarks.streams.features import class_order, split
from benchmarks.streams.whole_batches import Examples, TensorStream, plain_trainer


@dataclass
class Errors:
    """The change of past loss Σ_{s<t} L_s, with the penalty on weights, over each task t: the actual one and the one
    that the model predicts."""

    actual: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)

    def measures(self) -> dict[str, float]:
        """κ = actual − predicted in the mean over tasks, |κ| likewise, ρ = Σ actual / Σ predicted, and the relative
        error Σ |κ| / Σ (|actual| + |predicted|), which is 0 for a model that is right and at most 1.

        >>> Errors([1.0, 3.0], [1.0, 1.0]).measures()
        {'kappa': 1.0, 'kappa_abs': 1.0, 'rho': 2.0, 'error': 0.3333333333333333}
        """
        if not self.predicted:
            return {}
        pairs = list(zip(self.actual, self.predicted))
        kappa = [actual - predicted for actual, predicted in pairs]
        whole, total = sum(abs(a) + abs(p) for a, p in pairs), sum(self.predicted)
        size = sum(map(abs, kappa))
        return {
            "kappa": sum(kappa) / len(kappa),
            "kappa_abs": size / len(kappa),
            "rho": sum(self.actual) / total if total else nan,
            "error": size / whole if whole else 0.0,
        }


def learned(config: Config, tasks: Sequence[Data], seed: int) -> tuple[nn.Module, Errors, int]:
    """The head after all tasks, the errors of its model of the past, and the bytes that were kept for the last one."""
    head, setting = config.head, config.setting
    growing = isinstance(config.policy, Accumulate) and config.policy.outputs
    first = int(tasks[0][1].max()) + 1 if growing else setting.outputs
    model, errors = head.build(setting.directions, first, seed), Errors()
    if config.method == JOINT:
        _fit_jointly(model, head, tasks, setting, seed)
        return model, errors, 0
    course = Course(config, model)
    for number, data in enumerate(tasks):
        if growing:
            grow(model, max(last(model).out_features, int(data[1].max()) + 1))
        past, before = tasks[:number], deepcopy(model)
        course.begin()
        fit(model, head, data, course.objective, setting.schedule, seed + number, bend=course.bend(), look=course.look)
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise NonFiniteCurvatureError("The head diverged.")
        if past and course.predicts:
            ends = [_loss(one, head, past) + prior(one, setting.weight).item() for one in (before, model)]
            errors.actual.append(ends[1] - ends[0])
            errors.predicted.append(course.change())
        if number + 1 < len(tasks):
            course.absorb(data, len(tasks) - 1, seed + number)
    return model, errors, course.nbytes


class Course:
    """What is known of the past while a head learns: its quadratic model, or stored examples to replay."""

    def __init__(self, config: Config, model: nn.Sequential) -> None:
        self.config, self.head, self.model = config, config.head, model
        self.past = Past()
        self.penalty: Penalty | None = None
        self.memory: list[Data] = []
        self.centre: list[Tensor] = []
        self.before = self.mark = 0.0

    @property
    def outputs(self) -> int:
        return last(self.model).out_features

    @property
    def predicts(self) -> bool:
        return self.penalty is not None or bool(self.memory)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, and of the past what is known."""
        loss = self.head.loss(self.model(x), y) + prior(self.model, self.config.setting.weight, self.centre)
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        return sum((self.head.loss(self.model(x), y) for x, y in self.memory), loss)

    def bend(self) -> Callable[[Tensor], Tensor]:
        """The product with the curvature of all but the batch, of squared error on a linear head."""
        replayed = of_squares(self.memory) if self.memory else None

        def product(vector: Tensor) -> Tensor:
            total = self.config.setting.weight * vector
            if self.penalty is not None:
                total = total + self.penalty.strength * self.penalty.of.curvature.product(vector)
            return total if replayed is None else total + replayed(vector)

        return product

    def look(self, iteration: int) -> bool:
        """Revise the model of the past where its policy does."""
        policy, structure = self.config.policy, self.config.structure
        if policy is None or structure is None or not policy.revises or self.past.model is None:
            return False
        revised = policy.revise(self.past, self.model, iteration, GGN(), structure)
        if revised is self.past:
            return False
        self.before += self._predicted() - self.mark
        self._know(revised)
        self.mark = self._predicted()
        return True

    def absorb(self, data: Data, tasks: int, seed: int) -> None:
        """Take in a task at its end, of so many that have to be kept."""
        config, head = self.config, self.head
        if config.policy is not None and config.structure is not None:
            risk = EmpiricalRisk.snapshot(self.model, head.criterion, head.batches(data, self.outputs))
            self._know(config.policy.absorb(self.past, risk, GGN(), config.structure))
            if isinstance(config.policy, Merge):
                self.centre = [parameter.detach().clone() for parameter in self.model.parameters()]
        elif config.method == REPLAY:
            (x, y), space = data, ParameterSpace.of(self.model)
            size = PAIR.bytes(space, x.element_size()) + 2 * space.size * x.element_size()  # with an anchor and a slope
            count = max(1, size // (x[0].nbytes + y[0].nbytes) // tasks)
            at = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:count]
            self.memory.append((x[at], y[at]))

    def begin(self) -> None:
        """From now on `change` counts."""
        self.before, self.mark = 0.0, self._predicted()

    def change(self) -> float:
        """The change of past loss and of the penalty on weights that was predicted since, by each model of the past for
        as long as it was the one."""
        return self.before + self._predicted() - self.mark

    def _predicted(self) -> float:
        known = _loss(self.model, self.head, self.memory) if self.memory else predicted_loss(self.past, self.model)
        return known + prior(self.model, self.config.setting.weight, self.centre).item()

    @property
    def nbytes(self) -> int:
        stored = [batch for risk in self.past.stored for batch in risk.batches]
        held = sum(x.nbytes + y.nbytes for x, y in [*stored, *self.memory])
        return held + (0 if self.past.model is None else self.past.model.nbytes)

    def _know(self, past: Past) -> None:
        self.past = past
        self.penalty = None if past.model is None else Penalty(past.model, self.config.strength or 0.0)


_JOINT: dict[tuple, Tensor] = {}
"""The outputs of joint training, of the settings and heads of the seed that runs."""


def joint_outputs(setting: Setting, head: Network, seed: int, root: Path | None) -> Float[Tensor, "N C"]:
    """What joint training of the same head gives on the test examples: in closed form for squared error on a linear
    head; trained in one with all steps of the tasks for others."""
    key = setting, head, seed, root
    if key not in _JOINT:
        for known in [known for known in _JOINT if known[2] != seed]:
            del _JOINT[known]
        tasks, (x, _) = sequence(setting, seed, root, head.dtype)
        if head == SQUARED:
            _JOINT[key] = with_one(x.double()) @ closed_form(tasks, setting.weight)
        else:
            model = head.build(setting.directions, setting.outputs, seed)
            _fit_jointly(model, head, tasks, setting, seed)
            _JOINT[key] = outputs_of(model, head, x)
    return _JOINT[key]


def _fit_jointly(model: nn.Module, head: Network, tasks: Sequence[Data], setting: Setting, seed: int) -> None:
    """On the mean over tasks, of equally many examples, of what `Course.objective` adds up."""
    weight = setting.weight / setting.tasks
    fit(
        model, head, joined(tasks), lambda x, y: head.loss(model(x), y) + prior(model, weight), setting.schedule, seed,
        tasks=len(tasks), bend=lambda vector: weight * vector,
    )  # fmt: skip


def by_avalanche(config: Config, tasks: Sequence[Data], test: Data, seed: int) -> nn.Module:
    """The head as Avalanche's EWC trains it, by Adam on batches."""
    setting, schedule = config.setting, config.setting.schedule
    model = config.head.build(setting.directions, setting.outputs, seed).float()
    parts = tuple(Examples(x.float(), y) for x, y in tasks)
    tests = tuple(Examples(test[0][:1].float(), test[1][:1]) for _ in tasks)
    stream = TensorStream(benchmark(list(zip(parts, tests)), [0] * len(parts), CLASSES), parts, tests)
    mode, decay = ("online", 0.9) if config.method == ONLINE else ("separate", None)
    plugin = EWCPlugin(config.strength or 0.0, mode=mode, decay_factor=decay)
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.rate)
    torch.manual_seed(seed)
    trainer = plain_trainer(stream, model, optimizer, [plugin], batch=schedule.batch, steps=schedule.steps)
    for experience in stream.benchmark.train_stream:
        trainer.train(experience)
    return trainer.strategy.model.to(config.head.dtype).eval()


def of_sums(config: Config, train: Data, test: Data, seed: int) -> float:
    """The accuracy of a classifier that is made of sums over examples, from scikit-learn."""
    (x, y), (test_x, test_y) = ((part.double(), classes) for part, classes in (train, test))
    if config.method in (MEANS, LDA):
        made = NearestCentroid() if config.method == MEANS else LinearDiscriminantAnalysis("lsqr", shrinkage=SHRINKAGE)
        return float((made.fit(x.numpy(), y.numpy()).predict(test_x.numpy()) == test_y.numpy()).mean())
    weight = config.setting.weight
    if config.method == RANDOM:
        generator = torch.Generator().manual_seed(seed)
        units = torch.randn(x.shape[1], RANDOM_UNITS, generator=generator).double() / x.shape[1] ** 0.5
        x, test_x, weight = torch.relu(x @ units), torch.relu(test_x @ units), config.strength or 0.0
    penalty = 0.5 * weight * len(y) / config.setting.tasks
    ridge = Ridge(penalty, fit_intercept=False).fit(with_one(x).numpy(), F.one_hot(y, CLASSES).double().numpy())
    return accuracy(torch.from_numpy(ridge.predict(with_one(test_x).numpy())), test_y)


def sequence(setting: Setting, seed: int, root: Path | None, dtype: torch.dtype) -> tuple[list[Data], Data]:
    """The training examples of each task, in the order of the seed, and all test examples."""
    train, test = setting.features.read(root)
    onto = projection(train[0].shape[1], setting.directions)
    (x, y), test = (((part @ onto).to(dtype), classes) for part, classes in (train, test))
    places = torch.cat([(y == c).nonzero().flatten()[: setting.examples] for c in range(CLASSES)])
    cut = 0
    if setting.held_out:
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
        cut = round(setting.held_out * len(places))
        test = x[places[:cut]], y[places[:cut]]
    x, y = x[places[cut:]], y[places[cut:]]
    order = class_order(CLASSES, seed)
    names = torch.empty_like(order)
    names[order] = torch.arange(CLASSES) % setting.outputs  # as they come
    return [(x[at], names[y[at]]) for at in split(y, order, setting.tasks)], (test[0], names[test[1]])


def projection(inputs: int, width: int) -> Float[Tensor, "inputs width"]:
    """Random orthogonal directions, the same for every seed, as a part of the features; for all features the unit
    vectors."""
    if inputs == width:
        return torch.eye(inputs)
    drawn = torch.randn(inputs, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


@torch.no_grad()
def outputs_of(model: nn.Module, head: Network, x: Tensor) -> Float[Tensor, "N C"]:
    return head.seen(model(x)).double()


def accuracy(outputs: Float[Tensor, "N C"], classes: Int[Tensor, "N"]) -> float:
    """NaN where an output is not finite."""
    return float((outputs.argmax(1) == classes).double().mean()) if outputs.isfinite().all() else nan


@torch.no_grad()
def _loss(model: nn.Module, head: Network, tasks: Sequence[Data]) -> float:
    return float(sum(head.loss(model(x), y) for x, y in tasks))
