"""What each curvature costs and how near it comes to the exact one, beside the tools that a user would pick instead."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from avalanche_curv import (
    EKFAC,
    Accumulate,
    BlockDiagonal,
    Curvature,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    FlatSpectrum,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    Past,
    PerLayer,
    Rank,
    Structure,
    estimate,
)
from benchmarks.experiments.cost.models import (
    MLP,
    Classifier,
    ConvNet,
    Family,
    LanguageModel,
    ResNet18,
    Transformer,
    digits,
)
from benchmarks.experiments.cost.peers import Batches, Peer, absent, installed, peer_of
from benchmarks.experiments.cost.scale import Scaling, scaled, scalings
from benchmarks.experiments.languages.experiment import SETTINGS
from benchmarks.harness import Context, Experiment, Record
from benchmarks.harness.options import one_of
from benchmarks.timing import (
    Pair,
    Repetitions,
    Stopwatch,
    batches_of,
    clocked,
    experience,
    gradient_passes,
    interleaved,
    naive,
    perturb,
)

MODELS, SCALE = PARTS = ("models", "scale")
FEW = 1000  # examples of the structures that look at rows
FEWER = 1  # windows of the kinds that take a backward pass for each token and class
DIGITS = 500
TRAINING_STEPS = 100
LANGUAGE = SETTINGS["small"]


@dataclass(frozen=True)
class Work:
    """One row: a kind in a structure, built from the first `examples` (None for all)."""

    name: str
    curvature: Curvature
    structure: Structure
    examples: int | None = None


@dataclass(frozen=True)
class Tool:
    """Another tool for a curvature, by its title among the peers, and its installed package."""

    title: str
    package: str
    version: str


@dataclass(frozen=True)
class Config:
    """One model. Times are medians over `rounds`; steps are timed with the past of each number in `pasts`, none where
    Avalanche's loop does not take the targets; accuracy is that on `small`. `peers` are the installed ones with their
    versions, so that installing one asks for a new run; they see the first `peer_examples`, since many of them are
    slow."""

    label: str
    model: Family
    small: Classifier | None
    works: tuple[Work, ...]
    peers: tuple[Tool, ...] = ()
    examples: int = 10_000
    peer_examples: int = 1000
    batch: int = 128
    rounds: int = 5
    steps: int = 12
    pasts: tuple[int, ...] = (1, 5)
    cost: float = 1.0


@dataclass(frozen=True)
class CostOptions(Repetitions):
    """What is priced."""

    part: Annotated[str, one_of("part", PARTS)] = MODELS
    """models: every curvature and structure on some models, beside other tools; scale: each way to keep the past on
    networks and pasts that grow"""


class Cost(Experiment):
    """Build time in gradient passes, step time in steps of Naive, bytes, and distance from the exact matrix."""

    name = "cost"
    options_type = CostOptions
    jobs = 1  # a second one would disturb the times

    def variant(self, options: CostOptions) -> str:
        return "" if options.part == MODELS else options.part

    def configs(self, options: CostOptions) -> Sequence[Config | Scaling]:
        if options.part == SCALE:
            return [config.quick() for config in scalings()] if options.quick else scalings()
        return [_quick(config) for config in grid()] if options.quick else grid()

    def run(self, config: Config | Scaling, seed: int, context: Context) -> Iterator[Record]:
        """Prices on the model, sizes, and errors on the small one; `row` names the work. Of what is scaled see
        `scaled`."""
        if isinstance(config, Scaling):
            yield from scaled(config)
            return
        model = config.model.build().eval()
        batches, peers = [config.model.examples(8)], []
        for peer in (peer_of(tool.title) for tool in config.peers):
            try:
                peer.ready(model, batches)()
                peers.append(peer)
            except Exception as error:  # of others' code, whose kinds of errors are not known here; the report shows it
                yield {"metric": "failed", "value": 1.0, "row": peer.title, "reason": _reason(error)}
        for package in absent():
            yield {"metric": "absent", "value": 1.0, "row": package, "package": package}
        space = ParameterSpace.of(model)
        yield {"metric": "parameters", "value": space.size, "row": "model"}
        yield from builds(config, model, peers)
        yield from sizes(config, model, space)
        if config.pasts:
            yield from steps(config)
        if config.small is not None:
            yield from errors(config, config.small, peers)


def grid() -> list[Config]:
    """One configuration for each model."""
    sampled, top = Fisher(samples=1, seed=0), LowRank(Rank(10))
    diagonals = (
        Work("empirical Fisher, diagonal", EmpiricalFisher(), Diagonal()),
        Work("Fisher, diagonal", Fisher(), Diagonal()),
        Work("Fisher of one sample, diagonal", sampled, Diagonal()),
    )
    factors = (
        Work("empirical Fisher, KFAC", EmpiricalFisher(), Kronecker()),
        Work("Fisher of one sample, KFAC", sampled, Kronecker()),
        Work("Fisher, KFAC (type 2)", Fisher(), Kronecker()),
    )
    eigenvalues = (
        Work("empirical Fisher, EKFAC", EmpiricalFisher(), EKFAC()),
        Work("Fisher of one sample, EKFAC", sampled, EKFAC()),
    )
    ranks = (
        Work("empirical Fisher, top 10", EmpiricalFisher(), top, FEW),
        Work("empirical Fisher, top 10 flat", EmpiricalFisher(), FlatSpectrum(top), FEW),
        Work("empirical Fisher, top 10 of each layer", EmpiricalFisher(), BlockDiagonal(PerLayer(), top), FEW),
    )
    free = (
        Work("empirical Fisher, matrix-free on 10 %", EmpiricalFisher(), MatrixFree(fraction=0.1), FEW),
        Work("Fisher, matrix-free on 10 %", Fisher(), MatrixFree(fraction=0.1), FEW),
    )
    whole = (
        Work("empirical Fisher, dense", EmpiricalFisher(), Dense()),
        Work("Fisher, dense", Fisher(), Dense()),
        Work("Fisher, dense for each parameter", Fisher(), BlockDiagonal()),
    )
    small_mlp, small_conv = MLP(64, 12), ConvNet(8, (4, 8), 32)
    all_works = (*diagonals, *factors, *eigenvalues, *ranks, *free)
    tools = {peer: Tool(peer.title, peer.package, version) for peer, version in installed().items()}
    peers = tuple(tool for peer, tool in tools.items() if not peer.partial)
    few = tuple(tool for peer, tool in tools.items() if peer.broad)
    of_tokens = tuple(tool for peer, tool in tools.items() if peer.broad or peer.partial)
    exact = replace(diagonals[1], examples=FEWER)
    broad = Config(
        "vision transformer", Transformer(32, 8, 2, 64, 128), Transformer(8, 4, 1, 8, 8),
        (*diagonals, *factors, eigenvalues[0], ranks[0], free[0]), few, examples=256, rounds=2, steps=3, pasts=(1,),
    )
    return [
        Config("MLP 784-400-400-10", MLP(784, 400), small_mlp, all_works, peers, rounds=3, cost=4.0),
        Config("MLP 64-12-12-10", small_mlp, small_mlp, (*diagonals[:2], *whole), examples=FEW),
        Config(
            "conv net", ConvNet(28, (32, 64), 480), small_conv, all_works, peers,
            examples=2000, peer_examples=256, rounds=2, cost=3.0,
        ),
        replace(
            broad, label="ResNet-18", model=ResNet18(), small=None, works=(diagonals[0], *factors[:2]),
            examples=128, steps=2, cost=2.0,
        ),
        broad,
        Config(
            "GPT over bytes, windows of 32", LanguageModel(LANGUAGE.size), None,
            (diagonals[0], exact, diagonals[2], *factors[:2], *eigenvalues), of_tokens,
            examples=1024, peer_examples=1024, rounds=3, pasts=(), cost=3.0,
        ),
    ]


def _quick(config: Config) -> Config:
    """Every row on tiny models and few examples; errors on multilayer perceptrons alone."""
    works = tuple(replace(work, examples=work.examples and min(work.examples, 16)) for work in config.works)
    small = config.small if isinstance(config.small, MLP) else None
    few: dict[str, Any] = {"examples": 32, "peer_examples": 16, "batch": 8, "steps": 2, "rounds": 1}
    return replace(config, model=config.model.tiny(), small=small, works=works, **few)


def builds(config: Config, model: nn.Module, peers: list[Peer]) -> Iterator[Record]:
    """Each beside an epoch of plain gradient passes over the same examples."""
    work: dict[str, Pair] = {}

    def add(name: str, examples: int, make: Callable[[Batches], Callable[[], Any]]) -> None:
        own = batches_of(config.model.examples(examples), config.batch)
        work[name] = (clocked(gradient_passes(model, own)), clocked(make(own)))

    for row in config.works:
        add(row.name, row.examples or config.examples, partial(_build, row, model))
    for peer in peers:
        few = min(config.peer_examples, config.examples)
        add(peer.title, config.examples if peer.decomposes else few, partial(peer.ready, model))
    yield from _records("build", work, config.rounds)


def sizes(config: Config, model: nn.Module, space: ParameterSpace) -> Iterator[Record]:
    """Bytes of a matrix, and what its structure says beforehand."""
    itemsize = next(model.parameters()).element_size()
    for row in config.works:
        batches = batches_of(config.model.examples(row.examples or config.examples), config.batch)
        enough = batches if _needs_examples(row) else batches[:1]
        held = _build(row, model, enough)().curvature.nbytes
        yield {"metric": "bytes/held", "value": held, "row": row.name}
        yield {"metric": "bytes/foreseen", "value": row.structure.bytes(space, itemsize), "row": row.name}


def steps(config: Config) -> Iterator[Record]:
    """A training step with each structure's past beside one of Naive; rows of one structure share the number."""
    plain = _Timed(config, None, 0)
    for count in config.pasts:
        first: dict[Any, Work] = {}
        for row in config.works:
            if count == min(config.pasts) or _grows(row.structure):
                first.setdefault(row.structure, row)
        timed = {row.name: (plain.seconds, _Timed(config, row, count).seconds) for row in first.values()}
        found = list(_records(f"step{count}", timed, config.rounds))
        for row in config.works:
            if row.structure in first:
                like = first[row.structure].name
                yield from ({**record, "row": row.name} for record in found if record["row"] == like)


def errors(config: Config, small: Classifier, peers: list[Peer]) -> Iterator[Record]:
    """‖Ĉ − C‖ / ‖C‖ in the Frobenius norm and tr Ĉ / tr C, with C the exact matrix, after some training on digits."""
    data = digits(small, DIGITS)
    model, batches = _trained(small.build(), *data), batches_of(data, config.batch)
    yield {"metric": "parameters", "value": ParameterSpace.of(model).size, "row": "small model"}
    exact: dict[Curvature, Tensor] = {}

    def distance(name: str, kind: Curvature, matrix: Tensor) -> Iterator[Record]:
        if kind not in exact:
            exact[kind] = estimate(kind, Dense(), _risk(model, batches)).curvature.dense().double()
        true, found = exact[kind], matrix.detach().double()
        yield {"metric": "error", "value": float((found - true).norm() / true.norm()), "row": name}
        yield {"metric": "trace", "value": float(found.trace() / true.trace()), "row": name}

    for row in config.works:
        kind = Fisher() if isinstance(row.curvature, Fisher) else row.curvature
        yield from distance(row.name, kind, _build(row, model, batches)().curvature.dense())
    for peer in peers:
        try:
            matrix = peer.ready(model, batches)()()
        except Exception as error:  # as in `run`
            yield {"metric": "no error", "value": 1.0, "row": peer.title, "reason": _reason(error)}
            continue
        yield from distance(peer.title, peer.exact, matrix)


class _Timed:
    """A strategy that remembers so many experiences, and will remember no more."""

    def __init__(self, config: Config, row: Work | None, count: int) -> None:
        model, self.watch = config.model.build(), Stopwatch()
        plugins: list[Any] = [self.watch]
        if row is not None:
            plugin: Any = CurvatureEWCPlugin(1.0, curvature=row.curvature, structure=row.structure)
            plugin.past = _past(config, row, model, count)
            plugin.after_training_exp = lambda *args, **kwargs: None
            plugins.insert(0, plugin)
        self.experience = experience(*config.model.examples(config.steps * config.batch))
        self.strategy = naive(model, config.batch, plugins)

    def seconds(self) -> float:
        self.strategy.train(self.experience, eval_streams=[])
        return self.watch.take()


def _past(config: Config, row: Work, model: nn.Module, count: int) -> Past:
    """What the plugin would hold after so many experiences: their exact sum, each at an anchor of its own."""
    own = copy.deepcopy(model).eval()
    past, policy, some = Past(), Accumulate(), row.examples or config.examples
    for number in range(count):
        data = config.model.examples(some if _needs_examples(row) else config.batch, seed=number)
        past = policy.absorb(past, _risk(own, batches_of(data, config.batch)), row.curvature, row.structure)
        perturb(own, number)
    return past


def _needs_examples(row: Work) -> bool:
    """Whether the matrix holds examples, so that its size and its products depend on their number."""
    return isinstance(row.structure, MatrixFree)


def _grows(structure: Structure) -> bool:
    """Whether a sum holds the terms of all its summands."""
    inner = structure.block if isinstance(structure, BlockDiagonal) else structure
    return isinstance(inner, (Kronecker, LowRank, FlatSpectrum, MatrixFree))


def _build(row: Work, model: nn.Module, batches: Batches) -> Callable[[], Any]:
    return lambda: estimate(row.curvature, row.structure, _risk(model, batches))


def _risk(model: nn.Module, batches: Batches) -> EmpiricalRisk:
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)


def _trained(model: nn.Module, inputs: Tensor, targets: Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def _reason(error: Exception) -> str:
    return ": ".join(part for part in (type(error).__name__, str(error)) if part)


def _records(group: str, work: dict[str, Pair], rounds: int) -> Iterator[Record]:
    """Each beside its reference, timed just before it."""
    timed = {(name, part): seconds for name, pair in work.items() for part, seconds in enumerate(pair)}
    times = interleaved(timed, rounds)
    for name in work:
        references, works = times[name, 0], times[name, 1]
        ratio = statistics.median(work / reference for reference, work in zip(references, works))
        yield {"metric": f"{group}/ratio", "value": ratio, "row": name}
        yield {"metric": f"{group}/milliseconds", "value": 1e3 * statistics.median(works), "row": name}
        yield {"metric": f"{group}/reference", "value": 1e3 * statistics.median(references), "row": name}


experiment = Cost()
