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
from avalanche_curv.core.quadratic.stability import Guarded, sharpness_of, stability
from avalanche_curv.core.structures import DenseMatrix, DiagonalMatrix, LowRankMatrix

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


@pytest.mark.parametrize("options", SGD)
@pytest.mark.parametrize(("factor", "diverges"), [(0.97, False), (1.03, True)])
def test_descent_on_the_penalty_diverges_just_above_the_limit_and_not_below(model, options, factor, diverges):
    curvature = DiagonalMatrix(torch.tensor([0.1, 3.0, 1.0]).double())
    past = quadratic(model, curvature)
    sharpness = sharpness_of(past)
    probe = stability(torch.optim.SGD(model.parameters(), lr=0.1, **options), 2.0, sharpness)
    strength = factor * probe.largest_strength
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    assert stability(optimizer, strength, sharpness).diverges is diverges
    nn.init.ones_(model.weight)
    for _ in range(3000):
        optimizer.zero_grad()
        (strength * past.penalty(model)).backward()
        optimizer.step()
    assert (not model.weight.abs().max() <= 10) is diverges  # not finite counts as large


def test_the_sharpness_of_any_structure_is_its_largest_eigenvalue():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 3, generator=generator).double()).Q.T.contiguous()
    matrix = LowRankMatrix(vectors, torch.tensor([4.0, 2.0, -7.0]).double())
    for curvature in (matrix, DenseMatrix(matrix.dense())):
        model = nn.Linear(40, 1, bias=False).double()
        assert sharpness_of(quadratic(model, curvature)) == pytest.approx(4.0, rel=1e-2)


def test_nothing_is_said_of_adam_of_no_strength_and_of_no_curvature(model):
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    assert stability(torch.optim.Adam(model.parameters(), lr=1.0), 5.0, 9.0) is None
    assert stability(sgd, 0.0, 9.0) is None
    assert stability(sgd, 5.0, -1.0) is None
    assert sharpness_of(quadratic(model, DenseMatrix(-torch.eye(3).double()))) == pytest.approx(-1)


def test_a_guard_looks_again_where_the_learning_rate_has_changed(model):
    past = quadratic(model, DiagonalMatrix(torch.ones(3).double()))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    stop, rescale = Guarded(StopIfUnstable(), 10.0, past), Guarded(RescaleIfUnstable(0.5), 10.0, past)
    assert stop.allowed(sgd) == rescale.allowed(sgd) == 10
    sgd.param_groups[0]["lr"] = 1.0
    assert rescale.allowed(sgd) == pytest.approx(1.0)
    with pytest.raises(UnstablePenaltyError):
        stop.allowed(sgd)
    sgd.param_groups[0]["lr"] = 4.0
    assert rescale.allowed(sgd) == pytest.approx(0.25)


def test_a_warning_is_given_once_for_a_picture(model):
    past = quadratic(model, DiagonalMatrix(torch.ones(3).double()))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    guarded = Guarded(WarnIfUnstable(), 10.0, past)
    with pytest.warns(UserWarning, match="diverges"):
        assert guarded.allowed(sgd) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd.param_groups[0]["lr"] = 2.0
        assert guarded.allowed(sgd) == 10


def test_guards_warn_rescale_and_stop_with_the_numbers(model):
    past = quadratic(model, DiagonalMatrix(torch.tensor([1.0, 4.0, 0.0]).double()))
    found = stability(torch.optim.SGD(model.parameters(), lr=0.5), 5.0, sharpness_of(past))
    numbers = r"lr 0.5 · strength 5 · λ_max 4 = 10 is above 2, .* stable up to strength 1 .* up to lr 0.1 at"
    with pytest.warns(UserWarning, match=numbers):
        assert WarnIfUnstable().strength(found) == 5.0
    assert RescaleIfUnstable(0.25).strength(found) == 0.25
    with pytest.raises(UnstablePenaltyError, match=numbers):
        StopIfUnstable().strength(found)


@pytest.mark.parametrize("margin", [0, 1.1, float("nan")])
def test_a_margin_is_a_share_of_what_is_stable(margin):
    with pytest.raises(ValueError, match=r"margin in \(0, 1\]"):
        RescaleIfUnstable(margin)
