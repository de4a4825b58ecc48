import math

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv.plasticity.measures import (
    condition_number,
    effective_rank,
    parameter_norm,
    singular_values,
    singular_values_of_gram,
    stable_rank,
    weight_spectra,
)


def matrix(rows, columns, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(size, seed=0):
    return torch.linalg.qr(matrix(size, size, seed)).Q


def on_paper(weight):
    """All quantities of one matrix, by numpy in float64, from the definitions."""
    values = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
    shares = values / values.sum()
    return {
        "spectral_norm": np.linalg.norm(weight.detach().double().numpy(), 2),
        "frobenius_norm": np.linalg.norm(weight.detach().double().numpy()),
        "stable_rank": np.linalg.norm(values) ** 2 / values[0] ** 2,
        "effective_rank": np.prod(shares ** -shares),
        "condition_number": values[0] / values[-1],
    }


# --- singular values ---


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_singular_values_are_those_of_numpy_whatever_the_precision_of_the_matrix(shape, dtype):
    weight = matrix(*shape, dtype=dtype)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(weight).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "decades", "tolerance"), [
    (torch.float64, 5, 1e-4), (torch.float32, 5, 1e-4), (torch.float32, 6.5, 1e-6),
])  # fmt: skip
def test_a_spread_of_decades_is_resolved_as_that_of_the_numbers_a_dense_matrix_holds(dtype, decades, tolerance):
    spread = torch.logspace(0, -decades, 64, dtype=torch.float64)
    weight = ((orthogonal(64, 1) * spread) @ orthogonal(64, 2)).to(dtype)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(weight).numpy(), expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("condition", [5e6, 2e7, 1e9])
def test_the_condition_of_a_matrix_that_is_nearly_singular_is_known(dtype, condition):
    """diag(1, ..., 1, 1 / κ) is exact in float32 up to the rounding of one entry; signs and places add none."""
    diagonal = torch.ones(256, dtype=torch.float64)
    diagonal[-1] = -1 / condition
    weight = torch.diag(diagonal)[torch.randperm(256, generator=torch.Generator().manual_seed(0))].to(dtype)
    assert condition_number(singular_values(weight)) == pytest.approx(condition, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_has_none(dtype, hole):
    weight = matrix(3, 4, dtype=dtype)
    weight[1, 2] = hole
    assert singular_values(weight).isnan().all()
    values = singular_values(weight)
    assert all(math.isnan(quantity(values)) for quantity in (stable_rank, effective_rank, condition_number))


def test_those_of_a_gram_matrix_are_those_of_its_root():
    root = matrix(4, 9)
    expected = np.linalg.svd(root.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values_of_gram(root @ root.T).numpy(), expected, rtol=1e-10)


# --- ranks on paper ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_outer_product_has_rank_one_and_no_condition(dtype):
    values = singular_values((matrix(6, 1) @ matrix(1, 4, 1)).to(dtype))
    assert stable_rank(values) == pytest.approx(1, abs=1e-6)
    assert effective_rank(values) == pytest.approx(1, abs=1e-5)
    if dtype == torch.float64:  # in float32 rounding is part of the matrix
        assert condition_number(values) == math.inf


@pytest.mark.parametrize(
    ("values", "stable", "effective", "condition"),
    [
        *((singular_values(scale * orthogonal(7)), 7, 7, 1) for scale in (1.0, 1e-20, 1e15)),
        (torch.tensor([3.0, 1.0]), 10 / 9, 4 / 3**0.75, 3),  # p = 3/4, 1/4
        (singular_values(torch.zeros(3, 2)), 0, 0, math.inf),
    ],
)
def test_ranks_and_condition_on_paper(values, stable, effective, condition):
    found = stable_rank(values), effective_rank(values), condition_number(values)
    assert found == pytest.approx((stable, effective, condition))


def test_ranks_are_ordered_one_stable_effective_rank():
    for seed in range(5):
        values = singular_values(matrix(6, 9, seed))
        assert 1 <= stable_rank(values) <= 6
        assert stable_rank(values) <= effective_rank(values) <= 6


# --- the weights of models ---


def test_every_kind_of_layer_is_seen_as_the_matrix_that_multiplies_its_input(make_model):
    model = make_model(lambda: nn.ModuleDict({
        "linear": nn.Linear(4, 6),
        "conv": nn.Conv2d(3, 5, 2, groups=1),
        "turned": nn.ConvTranspose2d(3, 5, 2),
        "norm": nn.BatchNorm2d(4),
        "attention": nn.MultiheadAttention(6, 2),
        "words": nn.Embedding(7, 3),
    }))
    q, k, v = model["attention"].in_proj_weight.chunk(3)
    expected = {
        "linear.weight": model["linear"].weight,
        "conv.weight": model["conv"].weight.reshape(5, 12),
        "turned.weight": model["turned"].weight.transpose(0, 1).reshape(5, 12),
        "attention.in_proj_weight[q]": q,
        "attention.in_proj_weight[k]": k,
        "attention.in_proj_weight[v]": v,
        "attention.out_proj.weight": model["attention"].out_proj.weight,
    }
    found = weight_spectra(model)
    assert list(found) == list(expected)
    for name, weight in expected.items():
        for quantity, value in on_paper(weight).items():
            assert getattr(found[name], quantity) == pytest.approx(value, rel=1e-9), (name, quantity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_measured_as_the_numbers_it_holds(dtype, make_model):
    model = make_model(lambda: nn.Linear(8, 5)).to(dtype)
    found = weight_spectra(model)["weight"]
    for quantity, value in on_paper(model.weight).items():
        assert getattr(found, quantity) == pytest.approx(value, rel=1e-9)
        assert type(getattr(found, quantity)) is float


def test_the_parameter_norm_is_over_all_trainable_parameters_each_once(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 2)))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    kept = [model[0].weight, model[0].bias, model[1].weight, model[1].bias, model[2].bias]
    expected = torch.cat([p.detach().reshape(-1) for p in kept]).norm()
    assert parameter_norm(model) == pytest.approx(float(expected), rel=1e-12)


def test_a_model_that_diverged_has_spectra_of_nan(net):
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    found = weight_spectra(net)
    assert all(math.isnan(value) for value in vars(found["0.weight"]).values())
    assert not any(math.isnan(value) for value in vars(found["2.weight"]).values())
    assert math.isnan(parameter_norm(net))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_has_no_spectrum():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0))
    assert list(weight_spectra(model)) == ["0.weight"]
    for without, name in ((model[1], "Linear"), (nn.BatchNorm1d(3), "BatchNorm1d")):
        with pytest.raises(ValueError, match=f"{name} has no weight that multiplies its input"):
            weight_spectra(without)
