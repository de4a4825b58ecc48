import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_curv import (
    EKFAC,
    GGN,
    BatchedEmpiricalFisher,
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
    Rank,
    estimate,
)
from avalanche_curv.core.fidelity.monitor import example_models
from avalanche_curv.core.risk import jacobians
from avalanche_curv.core.structures.rules import by_products

STRUCTURES = {"dense": Dense(), "blocks": BlockDiagonal(), "diagonal": Diagonal()}

EVERY = [
    *STRUCTURES.values(), LowRank(Rank(3)), FlatSpectrum(LowRank(Rank(3))), Kronecker(), EKFAC(), MatrixFree(),
    BlockDiagonal(PerLayer(), LowRank(Rank(2))),
]  # fmt: skip

KINDS = {
    "ggn": (GGN(), lambda paper: paper.ggns.mean(0)),
    "empirical": (EmpiricalFisher(), lambda paper: paper.empirical_fishers.mean(0)),
    "hessian": (Hessian(), lambda paper: paper.hessians.mean(0)),
    "batched": (BatchedEmpiricalFisher(2), lambda paper: paper.batch_gradients(2).T @ paper.batch_gradients(2) / 4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_structure_keeps_the_entries_of_the_explicit_matrix(kind, known, restricted, close):
    curvature, on_paper = KINDS[kind]
    matrix = on_paper(known.paper)
    for name, structure in STRUCTURES.items():
        expected = restricted(name, matrix, known.risk.space.sizes)
        close(estimate(curvature, structure, known.risk).curvature.dense(), expected)


@pytest.mark.parametrize("curvature", [GGN(), Fisher(samples=3, seed=2), EmpiricalFisher(), BatchedEmpiricalFisher(2)])
@pytest.mark.parametrize(("model", "name"), [("mlp", "cross_entropy"), ("conv", "summed_square")])
def test_shortcuts_equal_the_way_through_products(curvature, model, name, problem, close):
    risk = problem(model, name).risk
    for structure in STRUCTURES.values():
        close(estimate(curvature, structure, risk).curvature.dense(), by_products(curvature, structure, risk).dense())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_monte_carlo_fisher_is_the_sandwich_of_its_draws(structure, likelihood, problem, restricted, close):
    known, kind = problem("mlp", likelihood), Fisher(samples=3, seed=2)
    draws = kind.factor(known.risk.loss, known.paper.logits, known.paper.targets, kind.generator())
    rows = torch.einsum("ncp,ncm->nmp", known.paper.jacobians, draws).flatten(0, 1)
    expected = restricted(structure, rows.T @ rows / 7, known.risk.space.sizes)
    close(estimate(kind, STRUCTURES[structure], known.risk).curvature.dense(), expected)


@pytest.mark.parametrize("structure", STRUCTURES.values())
def test_chunks_of_one_example_change_nothing(structure, architecture, problem, monkeypatch, close):
    risk = problem(architecture, "cross_entropy").risk
    whole = estimate(GGN(), structure, risk).curvature.dense()
    monkeypatch.setattr(jacobians, "CHUNK_BYTES", 1)
    close(estimate(GGN(), structure, risk).curvature.dense(), whole)


@pytest.mark.parametrize("structure", STRUCTURES.values())
def test_curvature_is_linear_in_the_examples(structure, problem, close):
    risk = problem("mlp", "cross_entropy").risk
    first, rest = risk.select(torch.arange(2)), risk.select(torch.arange(2, 7))
    for kind in (GGN(), EmpiricalFisher(), Hessian()):
        whole, a, b = (estimate(kind, structure, part).curvature.dense() for part in (risk, first, rest))
        close(7 * whole, 2 * a + 5 * b)


def test_the_model_is_anchored_at_the_frozen_parameters_and_flat_there(problem):
    known = problem("mlp", "cross_entropy")
    past = estimate(GGN(), Diagonal(), known.risk)
    assert torch.equal(past.anchor, known.paper.anchor)
    assert past.gradient is None
    assert past(known.model) == past.constant == 0


def test_the_gradient_is_that_of_the_mean_loss(known, close):
    past = estimate(EmpiricalFisher(), Diagonal(), known.risk, gradient=True)
    close(past.gradient, known.paper.gradients.mean(0))


@pytest.mark.parametrize("structure", EVERY, ids=str)
def test_single_precision_data_give_single_precision_curvature(structure, architecture, problem):
    known = problem(architecture, "cross_entropy")
    batches = [(x.float(), y) for x, y in known.risk]
    single = EmpiricalRisk.snapshot(copy.deepcopy(known.model).float(), known.criterion, batches)
    found, exact = (estimate(GGN(), structure, risk).curvature for risk in (single, known.risk))
    assert {t.dtype for t in found.tensors()} == {torch.float32}
    assert (found.dense().double() - exact.dense()).norm() < 1e-4 * exact.dense().norm()


@pytest.mark.parametrize("kind", [GGN(), EmpiricalFisher(), Hessian(), Fisher(samples=40, seed=0)])
def test_a_loader_that_shuffles_at_every_pass_gives_the_same_curvature(kind, net, problem, close):
    batches = list(problem("mlp", "cross_entropy").risk)
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches)))
    loader = DataLoader(data, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    shuffled = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), loader)
    if isinstance(kind, Fisher):  # other examples get the draws, but each its own
        exact = estimate(Fisher(), Dense(), shuffled).curvature.dense()
        drawn = by_products(kind, Dense(), shuffled).dense()
        assert (drawn - exact).norm() < 0.2 * exact.norm()
        return
    expected = estimate(kind, Dense(), problem("mlp", "cross_entropy").risk).curvature.dense()
    close(estimate(kind, Dense(), shuffled).curvature.dense(), expected)
    close(by_products(kind, Dense(), shuffled).dense(), expected)


@pytest.mark.parametrize(
    ("kind", "structure"),
    [*((kind, structure) for structure in STRUCTURES.values() for kind in (Hessian(psd=Clip()), Fisher(1, seed=0))),
     *((GGN(), structure) for structure in EVERY)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("place", ["weight", "input"])
def test_what_is_not_finite_is_refused_with_a_remedy(kind, structure, value, place, net):
    x, y = torch.ones(2, 4).double(), torch.zeros(2, 3).double()
    with torch.no_grad():
        net[1] = nn.Identity()
        net[2].weight.fill_(1e200)
        (net[0].weight if place == "weight" else x).fill_(value)
    risk = EmpiricalRisk.snapshot(net, nn.MSELoss(), [(x, y)])
    with pytest.raises(NonFiniteCurvatureError, match=r"2 examples holds NaN or infinity.*lower the learning rate"):
        estimate(kind, structure, risk)


def test_nan_in_the_anchor_or_the_gradient_alone_is_refused(make_model):
    layer = make_model(lambda: nn.Linear(2, 1))
    nn.init.constant_(layer.bias, float("nan"))
    batch = (torch.ones(2, 2).double(), torch.zeros(2, 1).double())
    with pytest.raises(NonFiniteCurvatureError):  # C = 2 XᵀX/N does not depend on the parameters
        estimate(GGN(), Dense(), EmpiricalRisk.snapshot(layer, nn.MSELoss(), [batch]))
    nn.init.zeros_(layer.bias)
    infinite = EmpiricalRisk.snapshot(layer, nn.MSELoss(), [(batch[0], torch.full((2, 1), float("inf")))])
    with pytest.raises(NonFiniteCurvatureError):
        estimate(GGN(), Dense(), infinite, gradient=True)


def test_a_structure_over_its_limit_is_refused_before_anything_is_computed(problem):
    class Counting(list):
        passes = 0

        def __iter__(self):
            Counting.passes += 1
            return super().__iter__()

    known = problem("mlp", "cross_entropy")
    risk = EmpiricalRisk.snapshot(known.model, known.criterion, Counting(known.risk.batches))
    Counting.passes = 0
    with pytest.raises(MemoryError, match=r"43 parameters needs 14.4 KiB.*BlockDiagonal\(\) or Diagonal\(\)"):
        estimate(GGN(), Dense(max_bytes=100), risk)
    with pytest.raises(MemoryError, match=r"20 parameters \(0.weight\).*or Diagonal\(\)"):
        estimate(GGN(), BlockDiagonal(max_bytes=100), risk)
    assert Counting.passes == 0


KINDS_THAT_TOUCH_THE_MODEL = [GGN(), Fisher(), Fisher(samples=2, seed=1), EmpiricalFisher(), Hessian()]


@pytest.mark.parametrize("kind", KINDS_THAT_TOUCH_THE_MODEL)
@pytest.mark.parametrize("linear", [True, False])
def test_the_users_model_and_random_states_are_as_found(kind, linear, make_model, problem):
    norm = [] if linear else [nn.BatchNorm1d(5)]
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 5), *norm, nn.Dropout(0.5), nn.Linear(5, 3)))
    model.train()
    model[0].eval()
    batches = list(problem("mlp", "cross_entropy").risk)
    nn.CrossEntropyLoss()(model(batches[0][0]), batches[0][1]).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002

    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)
    for structure in STRUCTURES.values():
        past = estimate(kind, structure, risk, gradient=True)
        past(model), past.displacement(model), past.penalty(model)
    by_products(kind, Diagonal(), risk)
    example_models(kind, risk).compare(risk.anchor + 0.1)
    risk.subset(0.5, seed=0)

    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state))  # noqa: NPY002
    assert random.getstate() == python_state
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert [m.training for m in model.modules()] == flags
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in risk.parameters)
    assert not any(m._forward_hooks for m in risk.base.modules())


def test_estimates_are_made_under_no_grad_too(architecture, problem, close):
    """A strategy evaluates under `no_grad`."""
    risk = problem(architecture, "cross_entropy").risk
    for kind in (GGN(), EmpiricalFisher(), Hessian(), BatchedEmpiricalFisher(2)):
        for structure in STRUCTURES.values():
            expected = estimate(kind, structure, risk, gradient=True)
            with torch.no_grad():
                found = estimate(kind, structure, risk, gradient=True)
            close(found.curvature.dense(), expected.curvature.dense())
            close(found.gradient, expected.gradient)


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
def test_layers_that_see_only_some_examples_are_differentiated_example_by_example(structure) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4).double()
    x[:, 0] = torch.tensor([-1, -1, 1, 1, -1, 1, 1, -1])
    risk = EmpiricalRisk.snapshot(Experts().double(), nn.CrossEntropyLoss(), [(x, torch.randint(3, (8,)))])
    exact = estimate(GGN(), Dense(), risk).curvature.dense().diagonal()
    found = estimate(GGN(), structure, risk).curvature.dense().diagonal()
    experts = slice(0, 40)  # which have no factors
    torch.testing.assert_close(found[experts], exact[experts])
    if not isinstance(structure, Kronecker):
        assert float(found.sum()) == pytest.approx(float(exact.sum()))
