"""Models that change their floating point type between two experiences, and parameters of size 0."""

import copy

import pytest
import torch
from torch import nn

from avalanche_curv import (
    EKFAC,
    GGN,
    Accumulate,
    AdaptiveRefresh,
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalRisk,
    InputSpace,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    Past,
    PerLayer,
    ProtectedSpace,
    Rank,
    Refresh,
    Tikhonov,
    estimate,
    landscape,
)
from avalanche_curv.core.fidelity.monitor import PastModels
from avalanche_curv.core.quadratic.penalty import Penalty

STRUCTURES = [
    Diagonal(), Dense(), BlockDiagonal(PerLayer()), LowRank(Rank(5)), LowRank(Rank(3), residual=Diagonal()),
    Kronecker(KeepTerms()), EKFAC(KeepTerms()), MatrixFree(),
]  # fmt: skip
POLICIES = [
    Accumulate(), Merge(decay=0.5), Refresh(fraction=1.0), AdaptiveRefresh(damping=Tikhonov(0.5), fraction=1.0),
]  # fmt: skip
PAIRS = [*((POLICIES[0], structure) for structure in STRUCTURES), *((policy, Diagonal()) for policy in POLICIES[1:])]
FEW = [(POLICIES[0], Kronecker(KeepTerms())), *((policy, Diagonal()) for policy in POLICIES)]
MOVES = [
    *(("float", "double", *pair) for pair in PAIRS),
    *((*types, *pair) for types in (("double", "float"), ("bfloat16", "double")) for pair in FEW),
]
TYPES = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16}


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    return net.bfloat16()  # values that all types can hold


def risk_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(6, 3, generator=generator).bfloat16().to(next(model.parameters()))
    targets = torch.randint(3, (6,), generator=generator)
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(inputs, targets)])


@torch.no_grad()
def moved(model, by):
    for parameter in model.parameters():
        parameter += by  # exact in all types, or the same rounding
    return model


def double(model):
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(("before", "after", "policy", "structure"), MOVES, ids=str)
def test_the_past_of_two_types_is_the_sum_of_both(before, after, policy, structure, model):
    """q(θ) and its gradient are those of the curvatures that were estimated in each type, summed in float64."""
    first, second = TYPES[before], TYPES[after]
    model = model.to(first)
    past = policy.absorb(Past(), risk_of(model, 1), GGN(), structure)
    a1, c1 = double(model), estimate(GGN(), structure, risk_of(model, 1)).curvature.dense().double()
    model = moved(model.to(second), 0.25)
    assert policy.revise(past, model, 1, GGN(), structure).model is past.model
    past = policy.absorb(past, risk_of(model, 2), GGN(), structure)
    assert {part.dtype for part in past.model.curvature.tensors()} == {past.model.anchor.dtype}
    a2, c2 = double(model), estimate(GGN(), structure, risk_of(model, 2)).curvature.dense().double()
    c1_now = estimate(GGN(), structure, risk_of(model, 1)).curvature.dense().double()
    d1, d2 = double(moved(model, 0.25)) - a1, double(model) - a2
    gradient = {
        "Accumulate": lambda: c1 @ d1 + c2 @ d2,
        "Merge": lambda: (c1 / 2 + c2) @ d2,
        "Refresh": lambda: (c1_now + c2) @ d2,
        "AdaptiveRefresh": lambda: (c1_now + c2) @ d2 + d2 / 2 + past.model.gradient.double(),
    }[type(policy).__name__]()
    for penalty in (past.model.penalty, Penalty(past.model.following(model), 1.0)):
        model.zero_grad()
        penalty(model).backward()
        found = torch.cat([p.grad.double().reshape(-1) for p in model.parameters()])
        assert (found - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("types", [("float", "double"), ("double", "float"), ("float", "bfloat16")])
def test_fidelity_and_protected_spaces_follow_a_model_into_another_type(types, model):
    """Here with the same values in both types, so that what is measured is the same as in float64."""
    first, second = (TYPES[name] for name in types)
    measured, used = {}, {}
    for name, (one, two) in {"moved": (first, second), "double": (torch.float64, torch.float64)}.items():
        net = copy.deepcopy(model).to(one)
        risk = risk_of(net, 1)
        past, space = PastModels(GGN()).with_experience(risk), ProtectedSpace().absorb(risk, Eigenspace(cut=Rank(6)))
        net = moved(net.to(two), 0.25)
        past, risk = past.with_experience(risk_of(net, 2)), risk_of(net, 2)
        measured[name] = past.measure(moved(net, 0.25)) | past.growth(net)
        again = space.absorb(risk, Eigenspace(cut=Rank(6)))
        used[name] = again.used, again.absorb(risk, Eigenspace(cut=Rank(6))).used
    assert used["moved"] == used["double"]
    rounding = 1e-1 if torch.bfloat16 in (first, second) else 1e-3
    for name in ("accumulate/kappa_abs", "accumulate/gamma", "refresh/kappa_abs", "refresh/gamma", "refresh/distance"):
        assert measured["moved"][name] == pytest.approx(measured["double"][name], rel=rounding)


class WithNothing(nn.Module):
    """A network, with parameters of size 0 beside it where it is asked for."""

    def __init__(self, nothing):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        if nothing:
            self.empty, self.narrow = nn.Parameter(torch.zeros(0)), nn.Linear(4, 0)
            self.back = nn.Linear(0, 3, bias=False)

    def forward(self, inputs):
        hidden = torch.tanh(self.body(inputs))
        outputs = self.head(hidden)
        return outputs + self.back(self.narrow(hidden)) + self.empty.sum() if hasattr(self, "empty") else outputs


@pytest.fixture
def with_and_without():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = WithNothing(True).double()
    plain = WithNothing(False).double()
    plain.load_state_dict({n: t for n, t in whole.state_dict().items() if n.startswith(("body", "head"))})
    return whole, plain


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("policy", "structure"), PAIRS, ids=repr)
def test_parameters_of_size_0_change_nothing(policy, structure, with_and_without):
    values = []
    for model in with_and_without:
        past = policy.absorb(Past(), risk_of(model, 1), GGN(), structure)
        past = policy.absorb(past, risk_of(moved(model, 0.25), 2), GGN(), structure)
        past.model.penalty(moved(model, 0.25)).backward()
        values.append((past.model(model), past.model.curvature.dense(), model.body.weight.grad))
    for found, expected in zip(*values):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_nor_do_they_where_loss_is_measured_or_steps_are_projected(with_and_without):
    values = []
    for model in with_and_without:
        risk = risk_of(model, 1)
        recipes = Eigenspace(cut=Rank(4), per=PerLayer()), InputSpace()
        spaces = [ProtectedSpace().absorb(risk, recipe) for recipe in recipes]
        past = PastModels(GGN()).with_experience(risk)
        values.append((
            [space.used for space in spaces], landscape(GGN(), risk).sharpness, past.measure(moved(model, 0.25)),
        ))
    assert values[0][0] == values[1][0]
    assert values[0][1] == pytest.approx(values[1][1])
    assert values[0][2] == pytest.approx(values[1][2])
