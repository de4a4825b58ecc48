"""Faults of torch that this package works around. A test that fails here says that torch is mended: take out the
workaround that its docstring names, and the test."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, layer_norm, scaled_dot_product_attention


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(function, at, cotangents):
    """Jᵀc for each cotangent c, mapped by `vmap` and one after the other."""
    pull = vjp(function, at)[1]
    return vmap(lambda c: pull(c)[0])(cotangents), torch.stack([pull(c)[0] for c in cotangents])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_vmap_over_cotangents_of_cdist_is_wrong(p):
    """Worked around in avalanche_curv/core/risk/jacobians.py, which compares rows with plain reverse mode."""
    x, prototypes = draw(1, 4), draw(3, 4, seed=1)
    mapped, exact = rows(lambda b: torch.cdist(x, b, p)[0], prototypes, torch.eye(3).double())
    assert (mapped - exact).abs().max() > 0.1


def test_nested_vmap_of_lu_solve_is_wrong_where_the_inner_one_maps_right_sides_alone():
    """Worked around in avalanche_curv/core/risk/jacobians.py, as above: rows through `torch.linalg.solve` and `det`,
    whose derivative solves with the saved factors, are mapped over examples, then over cotangents."""
    matrices, sides = draw(3, 4, 4) + 4 * torch.eye(4).double(), draw(3, 5, 4, 1, seed=1)
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrices)
    found = vmap(lambda f, p, some: vmap(lambda b: torch.linalg.lu_solve(f, p, b))(some))(factors, pivots, sides)
    assert (found - torch.linalg.solve(matrices[:, None], sides)).abs().max() > 0.1


def test_the_second_derivative_of_weight_norm_holds_the_norms_as_constants():
    """Worked around in avalanche_curv/core/curvature/second_derivatives.py, which compares products with differences.
    The norms that `torch._weight_norm` saves for its derivative carry no graph (dim=0, as in `weight_norm`)."""
    v, g = draw(3, 4), draw(3, 1, seed=1)
    true = hessian(lambda v: (g * v / v.norm(dim=1, keepdim=True)).sin().sum())(v)
    v.requires_grad_()
    slope = torch.autograd.grad(torch._weight_norm(v, g, 0).sin().sum(), v, create_graph=True)[0]
    found = torch.stack([torch.autograd.grad(s, v, retain_graph=True)[0] for s in slope.reshape(-1)]).view(3, 4, 3, 4)
    assert (found - true).abs().max() > 0.1 * true.abs().max()


def mixed_derivative(norm):
    """∂/∂w of the derivative along t, by forward mode over `jacrev` and by reverse mode over reverse mode."""
    x, t, w = draw(3, 4), draw(3, 4, seed=1), draw(4, seed=2)
    slope = lambda x, w, of: of(lambda w: norm(x, w).sin().sum())(w)  # noqa: E731
    exact = vjp(lambda x: slope(x, w, grad), x)[1]
    exact = torch.stack([(exact(row)[0] * t).sum() for row in torch.eye(4).double()])
    return jvp(lambda x: slope(x, w, jacrev), (x,), (t,))[1], exact


def test_forward_mode_over_jacrev_is_wrong_for_the_scale_of_a_layer_norm():
    """Worked around in avalanche_curv/core/curvature/second_derivatives.py: the Hessian goes reverse over reverse,
    where curvlinops goes this way. See also pytorch/pytorch#196700."""
    forward, exact = mixed_derivative(lambda x, w: layer_norm(x, (4,), w))
    assert (forward - exact).abs().max() > 1e-3 * exact.abs().max()


def test_group_norm_has_no_forward_mode_over_reverse_mode_within_no_grad():
    """Worked around in avalanche_curv/core/curvature/second_derivatives.py, in the same way. It has one outside of
    `no_grad`, which changes nothing else of forward mode."""
    with torch.no_grad(), pytest.raises(NotImplementedError, match="native_group_norm_backward"):
        jvp(jacrev(lambda x: group_norm(x, 2).sin().sum()), (draw(3, 4),), (draw(3, 4, seed=1),))


def test_vmap_has_no_rule_for_the_lstm():
    """Worked around in avalanche_curv/core/risk/jacobians.py: rows one example after the other."""
    lstm = nn.LSTM(2, 3, batch_first=True)
    with pytest.raises(RuntimeError):
        vmap(lambda x: lstm(x[None])[0])(torch.randn(4, 5, 2))


def test_the_fused_attention_has_no_second_derivative():
    """Worked around wherever `sdpa_kernel(SDPBackend.MATH)` stands, as in avalanche_curv/core/curvature/products.py."""
    x = torch.randn(1, 1, 4, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        slope = torch.autograd.grad(scaled_dot_product_attention(x, x, x).sin().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(slope.square().sum(), x)


def test_functional_call_ties_the_weight_of_a_module_under_two_names_to_itself():
    """Worked around in avalanche_curv/core/risk/empirical_risk.py (`_places`) with `tie_weights=False`."""
    model = nn.Module()
    model.first = model.second = nn.Linear(2, 2)
    model.forward = lambda x: model.second(model.first(x))
    before = copy.deepcopy(model.first.weight)
    functional_call(model, {"first.weight": torch.zeros(2, 2)}, (torch.ones(1, 2),))
    assert not torch.equal(model.first.weight, before)


def test_iterating_a_loader_that_draws_nothing_moves_the_random_state():
    """Worked around in avalanche_curv/core/risk/batches.py (`without_drawing`)."""
    before = torch.get_rng_state()
    list(torch.utils.data.DataLoader([0.0, 1.0]))
    assert not torch.equal(torch.get_rng_state(), before)
