"""Networks trained apart are merged at the minimum of the sum of their quadratic models, or by plain averaging."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from avalanche_curv import (
    EKFAC,
    GGN,
    Dense,
    Diagonal,
    EmpiricalRisk,
    KeepTerms,
    Kronecker,
    QuadraticModel,
    Structure,
    estimate,
    merged_parameters,
)
from benchmarks.data import CLASSES, FASHION, Images, check, read
from benchmarks.harness import Context, Experiment, Options, Record
from benchmarks.networks import mlp
from benchmarks.streams.features import RandomReLU

STRUCTURES: dict[str, Structure] = {
    "diagonal": Diagonal(), "Kronecker": Kronecker(KeepTerms()), "EKFAC": EKFAC(KeepTerms()), "dense": Dense(),
}  # fmt: skip
SLOPE = ", slope"
START, ALONE, JOINT = "start", "each alone", "joint training"
AVERAGE, UNWEIGHTED = "average", "average, unweighted"
SQUARED, LINEAR, SMALL, LARGE = "linear, squared error", "linear, softmax", "MLP 49-12-10", "MLP 196-100-10"
PAIRS, SKEWED = "two classes each", "skewed"
LARGEST = 1500  # parameters of a dense matrix
DAMPINGS = {False: (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0), True: (1e-3, 1e-2, 0.1, 1.0, 10.0)}  # True: hidden layers
TUNED = {  # in the order of the structures, each without and with the slope; `run tune --target merging --seeds 2`
    (LINEAR, PAIRS): (1.0, 1.0, 1e-6, 1e-4, 1e-6, 1.0, 1.0, 1.0),
    (LINEAR, SKEWED): (1.0, 1.0, 1e-6, 1e-4, 1e-5, 1e-4, 0.001, 0.001),
    (SMALL, PAIRS): (10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 1.0),
    (SMALL, SKEWED): (0.1, 10.0, 0.001, 0.01, 0.001, 0.01, 10.0, 0.01),
    (LARGE, PAIRS): (1.0, 10.0, 10.0, 10.0, 10.0, 10.0),
    (LARGE, SKEWED): (0.001, 10.0, 10.0, 10.0, 10.0, 10.0),
}


@dataclass(frozen=True)
class Setting:
    """What all methods share: images of side² pixels, and of these so many random features where there are any; a
    network that all begin from, trained on `begun` examples of all classes, and five that go on from it, each on a part
    of its own. A part has `examples`, in the skewed split from a third of them to five thirds."""

    network: str
    split: str
    images: str
    side: int
    hidden: tuple[int, ...] = ()
    features: int | None = None
    squared: bool = False
    parts: int = 5
    begun: int = 500
    examples: int = 900
    steps: int = 200
    batch: int = 64
    rate: float = 1e-3


@dataclass(frozen=True)
class Config:
    """One way to one network, at its tuned damping, and at each of `tried`."""

    method: str
    setting: Setting
    damping: float | None = None
    tried: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.setting.network}, {self.setting.split}, {self.method}"


@dataclass(frozen=True)
class Parts:
    """The networks of a setting, their examples, and the test set."""

    start: nn.Sequential
    networks: list[nn.Sequential]
    joint: nn.Sequential
    examples: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    criterion: nn.Module


class Merging(Experiment):
    """Test accuracy on all classes of networks merged in each way, beside those that were not."""

    name = "merging"

    def configs(self, options: Options) -> Sequence[Config]:
        if not options.quick:
            check("fashion", options.dataset_root)
        return [config for setting in settings(options.quick) for config in rows(setting)]

    def run(self, config: Config, seed: int, context: Context) -> Iterator[Record]:
        """Accuracy on the test set; for a linear head with squared error also how far its outputs are from those of the
        least squares solution for all examples."""
        parts = trained(config.setting, seed, context.dataset_root)
        found = [merged(parts, config, seed, context.dataset_root, config.damping or 0.0)]
        found = {START: [parts.start], ALONE: parts.networks, JOINT: [parts.joint]}.get(config.method, found)
        yield {"metric": "accuracy", "value": sum(accuracy(network, parts.test) for network in found) / len(found)}
        if config.setting.squared:
            with torch.no_grad():
                gaps = [(network(parts.test[0]) - parts.joint(parts.test[0])).abs().max() for network in found]
            yield {"metric": "gap", "value": float(max(gaps))}
        for damping in config.tried:
            network = merged(parts, config, seed, context.dataset_root, damping)
            yield {"metric": "damped", "value": accuracy(network, parts.test), "damping": damping}


def settings(quick: bool) -> list[Setting]:
    """Four networks, and two ways to part the examples of Fashion-MNIST; with `quick` two small networks on digits."""
    if quick:
        few = Setting(SQUARED, PAIRS, "digits", 8, (), 30, squared=True, begun=200, examples=100, steps=20)
        return [few, replace(few, network=SMALL, split=SKEWED, hidden=(6,), features=None, squared=False)]
    return [
        Setting(network, split, "fashion", side, hidden, features, network == SQUARED)
        for network, side, hidden, features in (
            (SQUARED, 14, (), 100), (LINEAR, 14, (), 100), (SMALL, 7, (12,), None), (LARGE, 14, (100,), None)
        )
        for split in (PAIRS, SKEWED)
    ]  # fmt: skip


def rows(setting: Setting) -> list[Config]:
    """All ways. Squared error is quadratic, and its heads are at their minima: neither damping nor slope is needed."""
    sizes = (setting.features or setting.side**2, *setting.hidden, CLASSES)
    dense = sum((a + 1) * b for a, b in pairwise(sizes)) <= LARGEST
    averages = [AVERAGE] + [UNWEIGHTED] * (setting.split == SKEWED)
    plain = [Config(method, setting) for method in (START, ALONE, JOINT, *averages)]
    names = [name for name, structure in STRUCTURES.items() if dense or not isinstance(structure, Dense)]
    if setting.squared:
        return plain + [Config(name, setting, 0.0) for name in names]
    ways, tried = [way for name in names for way in (name, name + SLOPE)], DAMPINGS[bool(setting.hidden)]
    return plain + [
        Config(way, setting, damping, tried)
        for way, damping in zip(ways, TUNED[setting.network, setting.split])
    ]  # fmt: skip


@lru_cache(maxsize=1)  # the runs of one seed follow each other
def trained(setting: Setting, seed: int, root: Path | None) -> Parts:
    """All networks of a setting, in double precision."""
    train, test = read(setting.images, 12_000, 0, root)
    x, test_x = seen(setting.images, setting.side, setting.features, root)
    generator = torch.Generator().manual_seed(seed)
    first, parts = parted(train.targets, setting, generator)
    torch.manual_seed(seed)
    start = mlp(x.shape[1], *setting.hidden, CLASSES).double()
    y = one_hot(train.targets, CLASSES).double() if setting.squared else train.targets
    criterion: nn.Module = nn.MSELoss(reduction="sum") if setting.squared else nn.CrossEntropyLoss()
    data = [(x[at], y[at]) for at in (first, *parts, torch.cat(parts))]
    found: list[nn.Sequential] = []
    steps = (setting.steps, *[setting.steps] * len(parts), setting.steps * len(parts))
    for number, (examples, count) in enumerate(zip(data, steps)):
        model = deepcopy(found[0] if found else start)
        rate = setting.rate if number else 3 * setting.rate
        fit = least_squares if setting.squared else by_adam
        found.append(fit(model, criterion, examples, count, setting.batch, rate, generator))
    return Parts(found[0], found[1:-1], found[-1], data[1:-1], (test_x, test.targets), criterion)


@lru_cache(maxsize=3)
def seen(name: str, side: int, features: int | None, root: Path | None) -> list[Float[Tensor, "N d"]]:
    """The images for training and for testing, of side² pixels, or as so many random features of these."""
    found, (mean, deviation) = [], FASHION if name == "fashion" else (0.0, 1.0)
    for images in read(name, 12_000, 0, root):
        pixels = adaptive_avg_pool2d(images.scaled(torch.arange(len(images.targets))), side)
        if features is None:
            found.append(pixels.flatten(1).sub_(mean).div_(deviation).double())
        else:
            smaller = Images((255 * pixels).byte(), images.targets, 255)
            found.append(RandomReLU(features).of(smaller).double())
    return found


def parted(targets: Tensor, setting: Setting, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """The places of the examples on which all begin, and of those of each part: of two classes, or four fifths of two
    classes and a fifth of all."""
    order, classes = (torch.randperm(n, generator=generator) for n in (len(targets), CLASSES))
    first, rest = order[: setting.begun], order[setting.begun :]
    alike, pool = rest[::2], rest[1::2]  # of the second half a fifth of a skewed part is drawn
    parts, taken = [], 0
    for own, two in enumerate(classes.split(CLASSES // setting.parts)):
        count = setting.examples
        if setting.split == SKEWED:
            count = setting.examples * (own + 1) * 2 // (setting.parts + 1)
        mixed = count // 5 if setting.split == SKEWED else 0
        some = alike[torch.isin(targets[alike], two)][: count - mixed]
        parts.append(torch.cat([some, pool[taken : taken + mixed]]))
        taken += mixed
    return first, parts


def by_adam(
    model: nn.Sequential, criterion: nn.Module, examples: tuple[Tensor, Tensor], steps: int, batch: int, rate: float,
    generator: torch.Generator,
) -> nn.Sequential:  # fmt: skip
    """The model after so many steps of Adam."""
    x, y = examples
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        at = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        criterion(model(x[at]), y[at]).backward()
        optimizer.step()
    return model


def least_squares(
    model: nn.Sequential, criterion: nn.Module, examples: tuple[Tensor, Tensor], *_: object
) -> nn.Sequential:
    """A linear model at the minimum of its squared error, whose curvature is a Kronecker product A ⊗ I: the nearest
    minimum, should there be several."""
    past = estimate(GGN(), Kronecker(), EmpiricalRisk.snapshot(model, criterion, [examples]), gradient=True)
    model.load_state_dict(past.minimiser())
    return model


@lru_cache(maxsize=1)
def quadratics(setting: Setting, structure: str, seed: int, root: Path | None) -> list[QuadraticModel]:
    """The quadratic model of the loss of each part around its own network, with the slope there."""
    parts = trained(setting, seed, root)
    risks = (EmpiricalRisk.snapshot(n, parts.criterion, [part]) for n, part in zip(parts.networks, parts.examples))
    return [estimate(GGN(), STRUCTURES[structure], risk, gradient=True) for risk in risks]


def merged(parts: Parts, config: Config, seed: int, root: Path | None, damping: float) -> nn.Sequential:
    """One network in the place of all, each weighing by its number of examples. Without the slope each network counts
    as a minimum of its loss."""
    method, weights = config.method, [float(len(y)) for _, y in parts.examples]
    network, name = deepcopy(parts.start), method.removesuffix(SLOPE)
    if name in STRUCTURES:
        models = quadratics(config.setting, name, seed, root)
        models = models if method.endswith(SLOPE) else [replace(model, gradient=None) for model in models]
        tolerance = 1e-12 if config.setting.squared else 1e-6
        found = merged_parameters(models, weights, damping=damping, tolerance=tolerance)
    else:
        shares = [1.0] * len(weights) if method == UNWEIGHTED else weights
        states = [part.state_dict() for part in parts.networks]
        found = {
            name: sum(w * state[name] for w, state in zip(shares, states)) / sum(shares) for name in states[0]
        }  # fmt: skip
    network.load_state_dict(found)
    return network


def accuracy(network: nn.Sequential, data: tuple[Tensor, Tensor]) -> float:
    """On a test set."""
    with torch.no_grad():
        return float((network(data[0]).argmax(1) == data[1]).double().mean())


experiment = Merging()
