"""Sums whose structure bounds their size stay bounded below, and what goes wrong in an estimate says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from avalanche_curv import (
    EKFAC,
    GGN,
    BlockDiagonal,
    Clip,
    Dense,
    Diagonal,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    FlatSpectrum,
    Hessian,
    Kronecker,
    LowRank,
    MatrixFree,
    NonFiniteCurvatureError,
    PerLayer,
    PiWeighted,
    Rank,
    estimate,
)
from avalanche_curv.core import eigen
from avalanche_curv.core.structures import low_rank


def on_a_line(weight: list[float], x: list[float]) -> EmpiricalRisk:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weight]))
    return EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.tensor([x]).double(), torch.zeros(1, 1).double())])


def test_a_sum_that_is_cut_keeps_its_minimum_and_stays_bounded_below() -> None:
    """w₁² + (2 w₂)²: of the curvatures 2 and 8 the larger is kept, and no slope of the other."""
    structure = LowRank(Rank(1), max_rank=1)
    places = ([0.0, 0.0], [1.0, 0.0]), ([5.0, 0.0], [0.0, 2.0])
    one, two = (estimate(GGN(), structure, on_a_line(*place)) for place in places)
    total = one + two
    model = nn.Linear(2, 1, bias=False).double()
    for w1, w2 in ((0.0, 0.0), (-5.0, 0.0), (-100.0, 3.0)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[w1, w2]]))
        assert float(total(model)) == pytest.approx(4 * w2**2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", [LowRank(Rank(2), max_rank=4), Kronecker(PiWeighted())], ids=str)
def test_bounded_sums_of_many_experiences_are_never_negative(structure, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    total = None
    for _ in range(5):
        x, y = torch.randn(20, 4, generator=generator).to(dtype), torch.randint(3, (20,), generator=generator)
        new = estimate(Fisher(), structure, EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)]))
        total = new if total is None else total + new
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    for _ in range(50):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
        assert float(total(model)) > -1e-5


class Attentive(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(1, (3, 4))
        x = x if self.batch_first else x.transpose(0, 1)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(mixed.mean(1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("structure", [LowRank(Rank(3)), BlockDiagonal(PerLayer(), Diagonal())], ids=str)
def test_products_that_lack_forward_derivatives_go_in_reverse(structure, batch_first, monkeypatch) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(9, 12).double(), torch.randint(3, (9,))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    risk = EmpiricalRisk.snapshot(Attentive(batch_first).double(), nn.CrossEntropyLoss(), batches)
    exact = estimate(Fisher(), Dense(), risk).curvature.dense()
    monkeypatch.setattr(low_rank, "WHOLE", 0)
    monkeypatch.setattr(low_rank, "GRAM_ROWS", 0)
    monkeypatch.setattr(eigen, "WHOLE", 0)
    matrix = estimate(Fisher(), structure, risk).curvature
    if isinstance(structure, LowRank):
        values = torch.linalg.eigvalsh(exact).flip(0)[:3]
        torch.testing.assert_close(matrix.values, values, rtol=1e-6, atol=1e-12)
    else:
        torch.testing.assert_close(matrix.dense().diagonal(), exact.diagonal(), rtol=1e-8, atol=1e-12)


STRUCTURES = [
    Dense(), Diagonal(), LowRank(Rank(3)), FlatSpectrum(LowRank(Rank(3))), Kronecker(), EKFAC(), MatrixFree(),
    BlockDiagonal(PerLayer(), LowRank(Rank(2))),
]  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_model_that_diverged_is_named_as_the_cause_by_every_structure(structure, value) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].weight.fill_(value)
        model[1].weight.fill_(1e200)
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.ones(6, 4).double(), torch.ones(6, 3).double())])
    with pytest.raises(NonFiniteCurvatureError, match="diverged weights"):
        estimate(EmpiricalFisher(), structure, risk)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EKFAC(), MatrixFree(), Dense()], ids=str)
def test_batches_of_sequences_of_different_length_are_not_mixed(structure) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x).mean(1))

    torch.manual_seed(0)
    batches = [(torch.randint(20, (4, n)), torch.randint(3, (4,))) for n in (5, 7, 7)]
    risk = EmpiricalRisk.snapshot(Words().double(), nn.CrossEntropyLoss(), batches)
    exact = estimate(Fisher(), Dense(), risk).curvature
    found = estimate(Fisher(), structure, risk).curvature
    if not isinstance(structure, Kronecker):
        assert found.trace() == pytest.approx(exact.trace())


class Experts(nn.Module):
    """Examples with a positive first entry take the second way."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for chosen, expert in zip((x[:, 0] <= 0, x[:, 0] > 0), self.experts):
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return self.head(out.tanh())


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), EKFAC()], ids=str)
def test_examples_that_take_different_paths_are_refused_by_layer(structure) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4).double()
    x[:, 0] = torch.tensor([-1, -1, 1, 1, -1, 1, 1, -1])
    risk = EmpiricalRisk.snapshot(Experts().double(), nn.CrossEntropyLoss(), [(x, torch.randint(3, (8,)))])
    with pytest.raises(ValueError, match=r"Layer 'experts\.\d' does not see every example once.*MatrixFree"):
        estimate(GGN(), structure, risk)


def test_a_flat_spectrum_of_a_clipped_hessian_is_as_stiff_as_its_largest_positive_eigenvalue() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])
    values = torch.linalg.eigvalsh(estimate(Hessian(), Dense(), risk).curvature.dense())
    found = estimate(Hessian(psd=Clip()), FlatSpectrum(LowRank(Rank(12))), risk).curvature.values
    torch.testing.assert_close(found, found.new_full((len(found),), float(values.max())))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: BlockDiagonal("layer"), TypeError), (lambda: BlockDiagonal(PerLayer), TypeError),
        (lambda: BlockDiagonal(PerLayer(), Dense), TypeError), (lambda: Kronecker(PiWeighted), TypeError),
        (lambda: Kronecker("pi"), TypeError), (lambda: Dense(max_bytes="4GB"), ValueError),
        (lambda: Kronecker(max_bytes=-1), ValueError), (lambda: LowRank(Rank(1), max_bytes=None), ValueError),
        (lambda: EKFAC(max_bytes=None), ValueError), (lambda: MatrixFree(0.5, seed="a"), ValueError),
        (lambda: Fisher(samples=1, seed="x"), ValueError),
    ],
)  # fmt: skip
def test_unusable_options_are_refused_when_they_are_given(make, error) -> None:
    with pytest.raises(error, match=r"takes|needs"):
        make()
