"""Memory is bounded as `estimate` says, also where an example has as many rows as there are classes."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avalanche_curv import (
    EKFAC,
    GGN,
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    Kronecker,
    LowRank,
    PerLayer,
    Rank,
    estimate,
)
from avalanche_curv.core.curvature import operators
from avalanche_curv.core.per_example import layer_kinds, passes
from avalanche_curv.core.quadratic import model as quadratic
from avalanche_curv.core.risk import jacobians

LIMIT = 2**16  # bytes, for tests with few classes
CLASSES, EXAMPLES = 12, 300  # S of all examples: 12 · 11 · 8 bytes for each, 0.3 MB


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest memory that an operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return found


def risk_of(classes, batches=1):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, classes), nn.Flatten()).double()
    x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (EXAMPLES,), generator=generator)
    size = -(-EXAMPLES // batches)
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), list(zip(x.split(size), y.split(size))))


STRUCTURES = [Diagonal(), Kronecker(), EKFAC(), Dense(), BlockDiagonal(PerLayer()), LowRank(Rank(3))]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: type(s).__name__)
def test_factors_of_all_examples_are_never_held_together(structure, monkeypatch):
    risk = risk_of(CLASSES)
    whole = estimate(GGN(), structure, risk).curvature.dense()
    for module, name in ((operators, "FACTOR_BYTES"), (passes, "CHUNK_BYTES"), (jacobians, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, LIMIT)
    with LargestTensor() as largest:
        pieces = estimate(GGN(), structure, risk).curvature.dense()
    torch.testing.assert_close(pieces, whole)
    assert largest.nbytes <= 2 * LIMIT < EXAMPLES * CLASSES * (CLASSES - 1) * 8


def test_rows_of_one_example_come_a_few_at_a_time_where_they_do_not_fit(monkeypatch):
    risk = risk_of(CLASSES).select(torch.arange(5))
    whole = torch.cat([*GGN().rows(risk)])
    monkeypatch.setattr(jacobians, "CHUNK_BYTES", 3 * risk.space.size * 8)
    parts = [*GGN().rows(risk)]
    assert max(map(len, parts)) == 3
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("structure", [Diagonal(), Dense()], ids=lambda s: type(s).__name__)
def test_draws_do_not_depend_on_the_pieces(structure, monkeypatch):
    kind = Fisher(samples=3, seed=0)
    expected = estimate(kind, structure, risk_of(CLASSES)).curvature.dense()
    monkeypatch.setattr(operators, "FACTOR_BYTES", LIMIT // 16)
    found = estimate(kind, structure, risk_of(CLASSES, batches=7)).curvature.dense()
    torch.testing.assert_close(found, expected)


class Words(nn.Module):
    """Words in and words out share one table; the output is the mean of their logits, in three parts."""

    def __init__(self, words):
        super().__init__()
        self.table, self.out = nn.Embedding(words, 4), nn.Linear(4, words)
        self.out.weight = self.table.weight

    def forward(self, index):
        return self.out(self.table(index).tanh()).unflatten(2, (3, -1)).mean((1, 3))


def test_rows_of_a_table_that_is_tied_to_a_head_are_held_for_few_examples(monkeypatch):
    """Their squares take one table, and a table for each of the examples that are worked on at once."""
    words, examples = 600, 40
    index = torch.randint(words, (examples, 2), generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Words(words).double()
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(index, torch.arange(examples) % 3)])
    whole = torch.cat([*GGN().rows(risk)]).square().sum(0)
    monkeypatch.setattr(layer_kinds, "CACHED", 2 * words * 5)
    monkeypatch.setattr(passes, "CHUNK", 4)
    with LargestTensor() as largest:
        found = estimate(GGN(), Diagonal(), risk).curvature.values
    torch.testing.assert_close(found, whole)
    assert largest.nbytes <= 5 * words * 5 * 8 < examples * words * 4 * 8


def test_eigenvectors_and_sums_of_models_are_never_copied_whole_to_a_wider_type(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 5))
        batch = torch.randn(12, 300), torch.randint(5, (12,))
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [batch])
    with LargestTensor() as largest:
        top = estimate(EmpiricalFisher(), LowRank(Rank(10)), risk).curvature
    assert largest.nbytes == top.vectors.nbytes
    monkeypatch.setattr(quadratic, "AT_ONCE", 1000)
    old = estimate(EmpiricalFisher(), Diagonal(), risk)
    shift = torch.linspace(-1, 1, old.space.size)
    new = replace(old, anchor=old.anchor + shift, gradient=-shift, constant=0.5)
    with LargestTensor() as largest:
        total = old + new
    assert largest.nbytes == old.anchor.nbytes
    expected = 0.5 + sum(0.5 * c * s**2 for c, s in zip(old.curvature.values.tolist(), shift.tolist()))
    assert total.constant == pytest.approx(expected, rel=1e-6)
    back = sum(0.5 * c * s**2 + s * s for c, s in zip(old.curvature.values.tolist(), shift.tolist()))  # gradient −s
    assert new.reanchored(old.anchor).constant == pytest.approx(0.5 + back, rel=1e-6)


THOUSAND = """
import resource, torch
from torch import nn
from avalanche_curv import Diagonal, EmpiricalRisk, Fisher, estimate
model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1000))
risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(torch.randn(256, 3), torch.randint(1000, (256,)))])
estimate(Fisher(samples=1), Diagonal(), risk)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
estimate(Fisher(), Diagonal(), risk)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the largest memory of a process is known on Unix")
def test_a_thousand_classes_take_a_few_hundred_megabytes():
    done = subprocess.run([sys.executable, "-c", THOUSAND], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit <= 400 * 2**20
