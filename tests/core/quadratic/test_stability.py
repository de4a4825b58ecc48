import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from avalanche_curv import (
    ParameterSpace,
    QuadraticModel,
    RescaleIfUnstable,
    StopIfUnstable,
    UnstablePenaltyError,
    WarnIfUnstable,
)
from avalanche_curv.core.quadratic.stability import Guarded
from avalanche_curv.core.structures.dense import DenseMatrix
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.low_rank import LowRankMatrix

SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.5, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.99, "nesterov": True},
]


def quadratic(model, curvature):
    return QuadraticModel(ParameterSpace.of(model), torch.zeros(curvature.size).double(), curvature)


@pytest.fixture
def model():
    return nn.Linear(3, 1, bias=False).double()


def ends_far(optimizer, past, model, strength, steps=300):
    """Whether descent on the penalty alone diverges, by doing it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (strength * past.penalty(model)).backward()
        optimizer.step()
    return not max(p.abs().max() for p in model.parameters()) <= 20  # not finite counts as large


@pytest.mark.parametrize("options", SGD)
@pytest.mark.parametrize(("factor", "diverges"), [(0.97, False), (1.03, True)])
def test_descent_on_the_penalty_diverges_just_above_the_limit_and_not_below(model, options, factor, diverges):
    past = quadratic(model, DiagonalMatrix(torch.tensor([0.1, 3.0, 1.0]).double()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    guarded = Guarded(None, past)
    strength = factor * guarded.stability(2.0, model, optimizer).largest_strength
    assert guarded.stability(strength, model, optimizer).diverges is diverges
    assert ends_far(optimizer, past, model, strength) is diverges


def two_layers():
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    root = torch.randn(9, 9, generator=generator).double()
    return model, quadratic(model, DenseMatrix(root @ root.T))


GROUPS = [
    ({"lr": 0.3}, {"lr": 0.003}),
    ({"lr": 0.02, "momentum": 0.9}, {"lr": 0.5}),
    ({"lr": 0.02, "momentum": 0.9, "nesterov": True}, {"lr": 0.03, "momentum": 0.5, "dampening": 0.5}),
    ({"lr": 0.1, "momentum": 0.99, "nesterov": True}, {"lr": 0.1, "momentum": 0.9}),
    ({"lr": 0.0}, {"lr": 0.1}),
]


@pytest.mark.parametrize("options", GROUPS, ids=str)
@pytest.mark.parametrize(("factor", "diverges"), [(0.97, False), (1.03, True)])
def test_each_parameter_group_descends_at_its_own_rate(options, factor, diverges):
    model, past = two_layers()
    optimizer = torch.optim.SGD([{"params": part.parameters(), **own} for part, own in zip(model, options)])
    guarded = Guarded(None, past)
    largest = guarded.stability(100.0, model, optimizer).largest_strength
    matrix, pace = past.curvature.dense(), []
    for part, group in zip(model, optimizer.param_groups):
        beta = group["momentum"]
        limit = 2 * (1 + beta) / (1 + 2 * beta if group["nesterov"] else 1)
        pace += sum(p.numel() for p in part.parameters()) * [group["lr"] * (1 - group["dampening"]) / limit]
    root = torch.tensor(pace).double().sqrt()
    assert largest == pytest.approx(1 / float(torch.linalg.eigvalsh(root[:, None] * matrix * root).max()), rel=1e-2)
    assert ends_far(optimizer, past, model, factor * largest) is diverges


def test_the_rate_of_another_group_does_not_lower_the_strength(model):
    """λ_max is 4 in a group of rate 0.1, and 1e-3 in one of rate 1."""
    model = nn.ModuleList([model, nn.Linear(3, 1, bias=False).double()])
    past = quadratic(model, DiagonalMatrix(torch.tensor([4.0, 1, 1, 1e-3, 1e-3, 0]).double()))
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(model, (0.1, 1.0))]
    sgd = torch.optim.SGD([*groups, {"params": [nn.Parameter(torch.zeros(2))], "lr": 1e4}])
    assert Guarded(StopIfUnstable(), past).allowed(4.9, model, sgd) == 4.9
    with pytest.raises(UnstablePenaltyError, match=r"lr 0\.1 of parameter group 0, which .*strength 5\.1"):
        Guarded(StopIfUnstable(), past).allowed(5.1, model, sgd)
    assert Guarded(RescaleIfUnstable(1.0), past).allowed(50.0, model, sgd) == pytest.approx(5.0, rel=1e-2)
    model[0].weight.requires_grad_(False)  # which no step moves
    assert Guarded(StopIfUnstable(), past).allowed(1900.0, model, sgd) == 1900


def test_lambda_max_is_computed_once_while_rates_keep_their_proportion(monkeypatch):
    model, past = two_layers()
    counted = []
    product = DenseMatrix.product
    monkeypatch.setattr(DenseMatrix, "product", lambda self, v: counted.append(1) or product(self, v))
    sgd = torch.optim.SGD([{"params": p.parameters(), "lr": lr} for p, lr in zip(model, (0.1, 0.3))])
    guarded = Guarded(RescaleIfUnstable(0.9), past)
    first = guarded.allowed(100.0, model, sgd)
    done = len(counted)
    for step in range(5):
        for group in sgd.param_groups:
            group["lr"] *= 1.1
        assert guarded.allowed(100.0 + step, model, sgd) <= first
    assert len(counted) == done


def test_the_sharpness_of_any_structure_is_its_largest_eigenvalue():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 3, generator=generator).double()).Q.T.contiguous()
    matrix = LowRankMatrix(vectors, torch.tensor([4.0, 2.0, -7.0]).double())
    for curvature in (matrix, DenseMatrix(matrix.dense())):
        model = nn.Linear(40, 1, bias=False).double()
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        found = Guarded(None, quadratic(model, curvature)).stability(1.0, model, sgd)
        assert found.sharpness == pytest.approx(4.0, rel=1e-2)


def test_nothing_is_said_of_adam_of_no_strength_and_of_no_curvature(model):
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    curved = Guarded(StopIfUnstable(), quadratic(model, DenseMatrix(9 * torch.eye(3).double())))
    assert curved.stability(5.0, model, torch.optim.Adam(model.parameters(), lr=1.0)) is None
    assert curved.stability(0.0, model, sgd) is None
    assert curved.allowed(0.0, model, sgd) == 0
    assert Guarded(None, quadratic(model, DenseMatrix(-torch.eye(3).double()))).stability(5.0, model, sgd) is None


def test_a_guard_looks_again_where_the_learning_rate_or_the_strength_has_changed(model):
    past = quadratic(model, DiagonalMatrix(torch.ones(3).double()))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    stop, rescale = Guarded(StopIfUnstable(), past), Guarded(RescaleIfUnstable(0.5), past)
    assert stop.allowed(10.0, model, sgd) == rescale.allowed(10.0, model, sgd) == 10
    with pytest.raises(UnstablePenaltyError):
        stop.allowed(21.0, model, sgd)
    sgd.param_groups[0]["lr"] = 1.0
    assert rescale.allowed(10.0, model, sgd) == pytest.approx(1.0)
    with pytest.raises(UnstablePenaltyError):
        stop.allowed(10.0, model, sgd)
    sgd.param_groups[0]["lr"] = 4.0
    assert rescale.allowed(10.0, model, sgd) == pytest.approx(0.25)
    assert rescale.allowed(0.1, model, sgd) == 0.1
    sgd.param_groups[0]["lr"] = 0.1
    for guarded in (rescale, copy.deepcopy(rescale), pickle.loads(pickle.dumps(rescale))):
        assert guarded.allowed(10.0, model, sgd) == pytest.approx(0.25)  # for as long as this model is in use


def test_a_warning_is_given_once_for_a_picture(model):
    past = quadratic(model, DiagonalMatrix(torch.ones(3).double()))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    guarded = Guarded(WarnIfUnstable(), past)
    with pytest.warns(UserWarning, match="diverges") as caught:
        assert guarded.allowed(10.0, model, sgd) == 10
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd.param_groups[0]["lr"] = 2.0
        assert guarded.allowed(20.0, model, sgd) == 20


def test_guards_warn_rescale_and_stop_with_the_numbers(model):
    past = quadratic(model, DiagonalMatrix(torch.tensor([1.0, 4.0, 0.0]).double()))
    found = Guarded(None, past).stability(5.0, model, torch.optim.SGD(model.parameters(), lr=0.5))
    numbers = r"lr 0.5 · strength 5 · λ_max 4 = 10 is above 2, .* stable up to strength 1 .* up to lr 0.1 at"
    with pytest.warns(UserWarning, match=numbers):
        assert WarnIfUnstable().strength(found) == 5.0
    assert RescaleIfUnstable(0.25).strength(found) == 0.25
    with pytest.raises(UnstablePenaltyError, match=numbers):
        StopIfUnstable().strength(found)


@pytest.mark.parametrize("margin", [0, 1.1, float("nan")])
def test_a_margin_is_a_share_of_what_is_stable(margin):
    with pytest.raises(ValueError, match=r"margin=\.\.\.\) must be a finite number, above 0, at most 1"):
        RescaleIfUnstable(margin)
