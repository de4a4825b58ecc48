"""A past is written as tensors and numbers, loaded without executing anything, and is then the same to the bit."""

import io
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from avalanche_curv import (
    EKFAC,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Energy,
    Fisher,
    FlatSpectrum,
    FrobeniusOptimal,
    KeepTerms,
    Kronecker,
    LowRank,
    Matrix,
    MatrixFree,
    PartialTraces,
    Past,
    PerLayer,
    PiWeighted,
    QuadraticModel,
    Rank,
    Refresh,
    RelativeError,
    SlopeAlone,
    estimate,
)
from avalanche_curv.core.risk.selection import Selection
from avalanche_curv.core.structures.diagonal import DiagonalMatrix

STRUCTURES = [
    Dense(), Diagonal(), BlockDiagonal(), BlockDiagonal(PerLayer(), LowRank(Rank(2))), LowRank(Rank(2), Diagonal()),
    FlatSpectrum(LowRank(Rank(2))), Kronecker(), EKFAC(),
    *(kind(sums, cut=cut) for kind in (Kronecker, EKFAC) for cut in (None, Rank(1), Energy(0.5))
      for sums in (KeepTerms(2, FrobeniusOptimal()), PartialTraces(), PiWeighted())),
]  # fmt: skip


@pytest.fixture
def net(make_model):
    return make_model(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))


def risk_at(model, task):
    generator = torch.Generator().manual_seed(task)
    inputs = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    targets = torch.randint(2, (12,), generator=generator)
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs, targets)])


def pasts(model, policy, structure):
    """The past of two tasks, and the same through a file."""
    past = Past()
    for task in range(2):
        past = policy.absorb(past, risk_at(model, task), Fisher(), structure)
    file = io.BytesIO()
    torch.save(past.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    return past, Past.load_state_dict(state, model=other, criterion=nn.CrossEntropyLoss())


def assert_same_penalty(past, loaded, model):
    for parameter in model.parameters():
        nn.init.uniform_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    values = [each.model.penalty(model) for each in (past, loaded)]
    gradients = [torch.autograd.grad(value, [*model.parameters()]) for value in values]
    assert float(values[0].detach()) != 0
    assert torch.equal(*values)
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_penalty_is_the_same_to_the_bit(structure, net):
    past, loaded = pasts(net, Accumulate(), structure)
    assert type(loaded.model.curvature) is type(past.model.curvature)
    assert (loaded.experiences, loaded.model.space) == (2, past.model.space)
    assert_same_penalty(past, loaded, net)
    risk = risk_at(net, 2)
    assert_same_penalty(*(Accumulate().absorb(each, risk, Fisher(), structure) for each in (past, loaded)), net)


@pytest.mark.parametrize(
    "policy",
    [
        Refresh(fraction=0.5, gradient=True), AdaptiveRefresh(RelativeError(1e-6), every=1, fraction=0.5),
        AdaptiveRefresh(RelativeError(1e-6), every=1, fraction=0.5, renew=SlopeAlone(4)),
    ],
    ids=str,
)
def test_stored_examples_go_on_as_they_would_have(policy, net):
    past, loaded = pasts(net, policy, Diagonal())
    assert_same_penalty(past, loaded, net)
    past, loaded = (policy.revise(each, net, 1, Fisher(), Diagonal()) for each in (past, loaded))
    assert loaded.refreshes == past.refreshes
    assert len(past.refreshes) == isinstance(policy, AdaptiveRefresh)
    risk = risk_at(net, 3)
    past, loaded = (policy.absorb(each, risk, Fisher(), Diagonal()) for each in (past, loaded))
    assert_same_penalty(past, loaded, net)


def test_a_state_is_no_view_of_the_past(net):
    past = Accumulate().absorb(Past(), risk_at(net, 0), Fisher(), Diagonal())
    state, before = past.state_dict(), past.model.anchor.clone()
    past.model.anchor.zero_()
    assert torch.equal(Past.load_state_dict(state).model.anchor, before)


@dataclass(frozen=True)
class Doubled(DiagonalMatrix):
    """A matrix of a user."""


def test_a_matrix_of_ones_own_needs_no_more_than_its_definition(net):
    past = Accumulate().absorb(Past(), risk_at(net, 0), Fisher(), Diagonal())
    own: Matrix = Doubled(2 * past.model.curvature.values)
    state = replace(past, model=replace(past.model, curvature=own)).state_dict()
    assert type(Past.load_state_dict(state).model.curvature) is Doubled
    state["fields"]["model"]["fields"]["curvature"]["type"] = "Unheard"
    with pytest.raises(ValueError, match=r"Unheard is not known here. Import the module"):
        Past.load_state_dict(state)


def test_what_is_no_tensor_and_what_is_missing_is_named(net):
    past = Accumulate().absorb(Past(), risk_at(net, 0), Fisher(), MatrixFree())
    with pytest.raises(TypeError, match=r"OperatorTerm is no tensor, number or string.* Use save_checkpoint"):
        past.state_dict()
    linear = replace(risk_at(net, 0), selection=Selection((nn.Linear,)))
    with pytest.raises(TypeError, match=r"The type Linear is no tensor"):
        Refresh(0.5).absorb(Past(), linear, Fisher(), Diagonal()).state_dict()
    stored = Refresh(0.5).absorb(Past(), risk_at(net, 0), Fisher(), Diagonal()).state_dict()
    with pytest.raises(ValueError, match="give the `model` and `criterion`"):
        Past.load_state_dict(stored, model=net)
    with pytest.raises(ValueError, match=r"Linear is not the model of the stored examples, .*Missing key"):
        Past.load_state_dict(stored, model=nn.Linear(3, 2), criterion=nn.CrossEntropyLoss())


def test_a_quadratic_model_has_a_state_of_its_own(net):
    model = estimate(Fisher(), Diagonal(), risk_at(net, 0), gradient=True)
    state = model.state_dict()
    assert repr(QuadraticModel.load_state_dict(state)) == repr(model)
    assert torch.equal(QuadraticModel.load_state_dict(state).gradient, model.gradient)
    with pytest.raises(ValueError, match=r"^Past.load_state_dict\(\) .* got that of QuadraticModel"):
        Past.load_state_dict(state)
    with pytest.raises(ValueError, match=r"got a dictionary of '0.weight', '0.bias', '1.weight', '1.bias'"):
        QuadraticModel.load_state_dict(net.state_dict())
    del state["fields"]["anchor"]
    with pytest.raises(ValueError, match=r"QuadraticModel is not made of space, curvature.*here: .*'anchor'"):
        QuadraticModel.load_state_dict(state)
