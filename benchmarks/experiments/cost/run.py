"""The work that is priced, and the matrices that are compared."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from torch import Tensor, nn

from avalanche_curv import (
    Accumulate,
    BlockDiagonal,
    Curvature,
    CurvatureEWCPlugin,
    Dense,
    EmpiricalRisk,
    Fisher,
    FlatSpectrum,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    Past,
    Structure,
    estimate,
)
from avalanche_curv.streams._benchmark import Examples, benchmark
from benchmarks.experiments.cost.models import CLASSES, Family, digits
from benchmarks.experiments.cost.peers import Batches, absent, peer_of
from benchmarks.experiments.speed.timing import Stopwatch, clocked
from benchmarks.harness.experiment import Record

if TYPE_CHECKING:
    from benchmarks.experiments.cost import Config, Work

DIGITS = 500
TRAINING_STEPS = 100
Pair = tuple[Callable[[], float], Callable[[], float]]
"""The seconds of a reference, and of some work."""


def run(config: Config) -> Iterator[Record]:
    """Prices on the model, sizes, and errors on the small one; `row` names the work."""
    model = config.model.build().eval()
    failed = dict(failures(config, model))
    for name, reason in failed.items():
        yield {"metric": "failed", "value": 1.0, "row": name, "reason": reason}
    for package in absent():
        yield {"metric": "absent", "value": 1.0, "row": package, "package": package}
    peers = [name for name in config.peers if name not in failed]
    space = ParameterSpace.of(model)
    yield {"metric": "parameters", "value": space.size, "row": "model"}
    yield from builds(config, model, peers)
    yield from sizes(config, model, space)
    yield from steps(config)
    if config.small is not None:
        yield from errors(config, config.small, peers)


def failures(config: Config, model: nn.Module) -> Iterator[tuple[str, str]]:
    """The peers that cannot take the model, found on one small batch, with the reason that they give."""
    batches = [config.model.examples(8)]
    for name in config.peers:
        try:
            peer_of(name).ready(model, batches)()
        except Exception as error:  # of others' code, whose kinds of errors are not known here; the report shows it
            yield name, _reason(error)


def builds(config: Config, model: nn.Module, peers: list[str]) -> Iterator[Record]:
    """Each beside an epoch of plain gradient passes over the same examples."""
    work: dict[str, Pair] = {}
    for row in config.works:
        own = _batches(*config.model.examples(row.examples or config.examples), config.batch)
        work[row.name] = (clocked(_gradients(model, own)), clocked(_build(row, model, own)))
    for name in peers:
        peer, few = peer_of(name), min(config.peer_examples, config.examples)
        own = _batches(*config.model.examples(config.examples if peer.decomposes else few), config.batch)
        work[name] = (clocked(_gradients(model, own)), clocked(peer.ready(model, own)))
    yield from _records("build", paired(work, config.rounds))


def sizes(config: Config, model: nn.Module, space: ParameterSpace) -> Iterator[Record]:
    """Bytes of a matrix, and what its structure says beforehand."""
    itemsize = next(model.parameters()).element_size()
    for row in config.works:
        batches = _batches(*config.model.examples(row.examples or config.examples), config.batch)
        enough = batches if _needs_examples(row) else batches[:1]
        held = _build(row, model, enough)().curvature.nbytes
        yield {"metric": "bytes/held", "value": held, "row": row.name}
        yield {"metric": "bytes/foreseen", "value": row.structure.bytes(space, itemsize), "row": row.name}


def steps(config: Config) -> Iterator[Record]:
    """A training step with each structure's past beside one of Naive; rows of one structure share the number."""
    naive = _Timed(config, None, 0)
    for count in config.pasts:
        first: dict[Any, Work] = {}
        for row in config.works:
            if count == min(config.pasts) or _grows(row.structure):
                first.setdefault(row.structure, row)
        timed = {row.name: (naive.seconds, _Timed(config, row, count).seconds) for row in first.values()}
        found = list(_records(f"step{count}", paired(timed, config.rounds)))
        for row in config.works:
            if row.structure in first:
                like = first[row.structure].name
                yield from ({**record, "row": row.name} for record in found if record["row"] == like)


def errors(config: Config, small: Family, peers: list[str]) -> Iterator[Record]:
    """‖Ĉ − C‖ / ‖C‖ in the Frobenius norm and tr Ĉ / tr C, with C the exact matrix, after some training on digits."""
    inputs, targets = digits(small, DIGITS)
    model = _trained(small.build(), inputs, targets)
    batches = _batches(inputs, targets, config.batch)
    yield {"metric": "parameters", "value": ParameterSpace.of(model).size, "row": "small model"}
    exact: dict[Curvature, Tensor] = {}
    for row in config.works:
        kind = Fisher() if isinstance(row.curvature, Fisher) else row.curvature
        if kind not in exact:
            exact[kind] = estimate(kind, Dense(), _risk(model, batches)).curvature.dense()
        found = _build(row, model, batches)().curvature
        yield from _distance(row.name, found.dense(), exact[kind])
    for name in peers:
        kind = peer_of(name).exact
        if kind not in exact:
            exact[kind] = estimate(kind, Dense(), _risk(model, batches)).curvature.dense()
        try:
            dense = peer_of(name).ready(model, batches)()()
        except Exception as error:  # as in `failures`
            yield {"metric": "no error", "value": 1.0, "row": name, "reason": _reason(error)}
            continue
        yield from _distance(name, dense, exact[kind])


def paired(work: dict[str, Pair], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each reference and its work, one after the other and in turn, `rounds` times after one warm-up."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in work}
    for number in range(rounds + 1):
        for name, (reference, timed) in work.items():
            seconds = reference(), timed()
            if number:
                times[name][0].append(seconds[0])
                times[name][1].append(seconds[1])
    return times


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
        data = Examples(*config.model.examples(config.steps * config.batch))
        self.experience = benchmark([(data, data)], [0], CLASSES).train_stream[0]
        self.strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=config.batch,
            plugins=plugins,
            evaluator=EvaluationPlugin(loggers=[]),
        )

    def seconds(self) -> float:
        self.strategy.train(self.experience, eval_streams=[])
        return self.watch.take()


def _past(config: Config, row: Work, model: nn.Module, count: int) -> Past:
    """What the plugin would hold after so many experiences: their exact sum, each at an anchor of its own."""
    own = copy.deepcopy(model).eval()
    past, policy, some = Past(), Accumulate(), row.examples or config.examples
    for number in range(count):
        inputs, targets = config.model.examples(some if _needs_examples(row) else config.batch, seed=number)
        risk = _risk(own, _batches(inputs, targets, config.batch))
        past = policy.absorb(past, risk, row.curvature, row.structure)
        _perturb(own, number)
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


def _gradients(model: nn.Module, batches: Batches) -> Callable[[], None]:
    parameters, criterion = list(model.parameters()), nn.CrossEntropyLoss()

    def work() -> None:
        for x, y in batches:
            torch.autograd.grad(criterion(model(x), y), parameters)

    return work


def _batches(inputs: Tensor, targets: Tensor, size: int) -> Batches:
    return list(zip(inputs.split(size), targets.split(size)))


def _trained(model: nn.Module, inputs: Tensor, targets: Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def _perturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)


def _distance(name: str, found: Tensor, exact: Tensor) -> Iterator[Record]:
    found, exact = found.detach().double(), exact.double()
    yield {"metric": "error", "value": float((found - exact).norm() / exact.norm()), "row": name}
    yield {"metric": "trace", "value": float(found.trace() / exact.trace()), "row": name}


def _reason(error: Exception) -> str:
    return ": ".join(part for part in (type(error).__name__, str(error)) if part)


def _records(group: str, times: dict[str, tuple[list[float], list[float]]]) -> Iterator[Record]:
    for name, (references, works) in times.items():
        ratio = statistics.median(work / reference for reference, work in zip(references, works))
        yield {"metric": f"{group}/ratio", "value": ratio, "row": name}
        yield {"metric": f"{group}/milliseconds", "value": 1e3 * statistics.median(works), "row": name}
        yield {"metric": f"{group}/reference", "value": 1e3 * statistics.median(references), "row": name}


