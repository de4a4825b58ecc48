"""The penalty as training adds it: equal to the quadratic model times strength, value and gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from avalanche_curv import GGN, BlockDiagonal, Dense, Diagonal, Kronecker, LowRank, MatrixFree, Rank, estimate
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.diagonal import DiagonalMatrix


def model_and_quadratics(count: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[QuadraticModel]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    space = ParameterSpace.of(model)

    def draw() -> torch.Tensor:
        return torch.randn(space.size, generator=generator, dtype=dtype)

    values = [draw().abs() * (draw() > 0) for _ in range(count)]  # some curvature is zero, as of a dead unit
    return model, [QuadraticModel(space, draw(), DiagonalMatrix(v)) for v in values]


def gradients(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_penalty_of_a_folded_diagonal_is_the_explicit_sum_of_half_squares(count: int) -> None:
    model, parts = model_and_quadratics(count)
    folded = parts[0]
    for part in parts[1:]:
        folded = folded + part
    penalty = Penalty(folded, strength=7.0)
    theta = folded.space.vector(model)
    explicit = sum(0.5 * (p.curvature.tensors()[0] * (theta - p.anchor) ** 2).sum() for p in parts)
    slope = sum(p.curvature.tensors()[0] * (theta - p.anchor) for p in parts)
    assert penalty.past.gradient is None  # around the minimum of the sum
    value = penalty(model)
    torch.testing.assert_close(value, 7.0 * explicit, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(3.0 * value, model), 21.0 * slope, rtol=1e-10, atol=1e-10)


def test_gradient_that_training_accumulates_is_not_shared_with_the_next_step() -> None:
    model, (past,) = model_and_quadratics(1)
    penalty = Penalty(past, strength=1.0)
    penalty(model).backward()
    first = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    kept = [p.grad for p in model.parameters()]
    penalty(model)
    for grad, before in zip(kept, first):
        torch.testing.assert_close(grad, before, rtol=0, atol=0)


def test_two_backward_passes_accumulate_both_gradients() -> None:
    model, (past,) = model_and_quadratics(1)
    penalty = Penalty(past, strength=2.0)
    expected = 2 * 2.0 * past.gradient_at(past.displacement(model))
    penalty(model).backward()
    penalty(model).backward()
    total = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_an_earlier_evaluation_keeps_its_own_gradient() -> None:
    model, (past,) = model_and_quadratics(1)
    penalty = Penalty(past, strength=1.0)
    expected = past.gradient_at(past.displacement(model))
    early = penalty(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    penalty(model)
    early.backward()
    total = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_of_one_evaluation_is_refused() -> None:
    model, (past,) = model_and_quadratics(1)
    value = Penalty(past, strength=1.0)(model)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"handed over in an earlier backward pass.*QuadraticModel\.penalty"):
        value.backward()


def test_second_derivatives_are_refused_instead_of_lacking_the_curvature() -> None:
    model, (past,) = model_and_quadratics(1)
    for value in (Penalty(past, strength=1.0)(model), past.penalty(model)):
        with pytest.raises(RuntimeError, match=r"create_graph.*curvature\.product"):
            torch.autograd.grad(value, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("curvature", [0.0, 1e-10])
def test_slope_outside_the_range_of_the_curvature_keeps_its_value(curvature: float) -> None:
    model, (past,) = model_and_quadratics(1, torch.float32)
    flat, slope = torch.full_like(past.anchor, curvature), torch.full_like(past.anchor, 0.05)
    sloped = QuadraticModel(past.space, past.anchor, DiagonalMatrix(flat), slope)
    penalty = Penalty(sloped, strength=2.0)
    assert penalty.past.gradient is not None
    torch.testing.assert_close(penalty(model), 2 * sloped(model))
    gradients = penalty.gradients(list(model.parameters()))
    torch.testing.assert_close(torch.as_tensor(penalty.weighted(gradients)), 2 * sloped(model))


@pytest.mark.parametrize(
    ("structure", "copies"),
    [(Dense(), True), (BlockDiagonal(), True), (Diagonal(), False), (LowRank(Rank(2)), False), (Kronecker(), False),
     (MatrixFree(), False)],
    ids=str,
)  # fmt: skip
def test_strength_goes_into_the_curvature_of_every_structure_that_scales_without_a_copy(structure, copies, problem):
    known = problem("mlp", "cross_entropy")
    past, model = estimate(GGN(), structure, known.risk), copy.deepcopy(known.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    penalty = Penalty(past, 3.0)
    assert past.curvature.copies_to_scale is copies
    assert (penalty.past.curvature is past.curvature) is copies
    for strength in (3.0, 0.5, 0.0, 2.0):
        penalty.strength = strength
        assert penalty.strength == strength
        torch.testing.assert_close(penalty(model), strength * past.penalty(model), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradients(penalty(model), model), strength * gradients(past.penalty(model), model), rtol=1e-12, atol=1e-12
        )
        penalty.gradients(list(model.parameters()))
        torch.testing.assert_close(penalty.last(), past(model), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="strength must be a finite number"):
        penalty.strength = float("nan")
