"""What a step with a penalty waits for, and what `torch.compile` makes of it."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    EKFAC,
    BlockDiagonal,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    Energy,
    Kronecker,
    LowRank,
    PartialTraces,
    Rank,
)
from avalanche_curv.core.structures import one_pass

STRUCTURES = [
    Diagonal(), Dense(), BlockDiagonal(), Kronecker(), Kronecker(PartialTraces()), Kronecker(cut=Energy(0.8)), EKFAC(),
    LowRank(Rank(2)),
]  # fmt: skip
FEW = 6  # steps, before the first look at what the penalty does


@pytest.fixture
def examples():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    return x, (x.sum(1) > 0).long()


@pytest.fixture
def network(make):
    return make(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


@pytest.fixture
def by_torch(monkeypatch):
    """As on other devices."""
    monkeypatch.setattr(one_pass, "loop", lambda *kind: None)


def with_past(model, examples, structure=Diagonal(), strength=1.0):  # noqa: B008  a frozen value
    regularizer, before = CurvatureRegularizer(strength, structure=structure), copy.deepcopy(model)
    for task in range(2):
        regularizer.absorb(before, nn.CrossEntropyLoss(), [(examples[0], (examples[1] + task) % 3)])
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.mul_(1.1)
    return regularizer


def step(model, optimizer, examples, regularizer, way):
    optimizer.zero_grad()
    loss = cross_entropy(model(examples[0]), examples[1])
    (loss + regularizer.penalty(model, optimizer) if way == "added" else loss).backward()
    if way == "beside":
        regularizer.add(model, optimizer)
    optimizer.step()
    if way != "attached":
        regularizer.revise(model)


def ready(network, examples, structure, way, strength=1.0):
    """A function that makes one step, the second of the task."""
    regularizer = with_past(network, examples, structure, strength)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    if way == "attached":
        regularizer.attach(optimizer, network)
    once = lambda: step(network, optimizer, examples, regularizer, way)  # noqa: E731
    once()
    return once


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize(
    ("way", "strength", "most"), [("attached", 1.0, 0), ("attached", 0.0, 0), ("beside", 1.0, 0), ("added", 1.0, 1)]
)
def test_a_step_reads_nothing_of_the_device(way, strength, most, structure, network, examples, reading):
    """A term of the loss looks once, on the CPU alone, whether it was scaled."""
    once = ready(network, examples, structure, way, strength)
    for _ in range(FEW - 1):
        with reading() as reads:
            once()
        assert reads.count <= most


def test_a_number_that_is_read_is_counted(reading):
    with reading() as reads:
        _ = torch.ones(2).sum().item() + len(torch.ones(3).nonzero())
    assert reads.count == 2


def test_a_compiled_model_and_a_compiled_optimizer_stay_one_graph_each(network, examples):
    torch._dynamo.reset()
    forward, update = CompileCounter(), CompileCounter()
    optimizer, plain = torch.optim.SGD(network.parameters(), lr=0.1), copy.deepcopy(network)
    regularizer = with_past(network, examples)
    model = torch.compile(network, backend=forward)
    stepped = torch.compile(optimizer.step, backend=update)
    with copy.deepcopy(regularizer).attach(optimizer, model):
        for _ in range(FEW):
            optimizer.zero_grad()
            cross_entropy(model(examples[0]), examples[1]).backward()
            stepped()
    assert (forward.frame_count, update.frame_count) == (1, 1)
    once = torch.optim.SGD(plain.parameters(), lr=0.1)
    with regularizer.attach(once, plain):
        for _ in range(FEW):
            step(plain, once, examples, regularizer, "attached")
    for one, other in zip(network.parameters(), plain.parameters()):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
@pytest.mark.parametrize("way", ["attached", "beside", "added"])
def test_on_a_gpu_a_step_neither_copies_nor_waits(way, network, examples):
    examples, before = tuple(part.cuda() for part in examples), torch.cuda.get_sync_debug_mode()
    for structure in STRUCTURES:
        once = ready(copy.deepcopy(network).cuda(), examples, structure, way)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(FEW - 1):
                once()
        finally:
            torch.cuda.set_sync_debug_mode(before)
