"""Each regulariser on tensors small enough for paper, and the laws that tell it from the others."""

import copy

import pytest
import torch
from torch import nn

from avalanche_curv import L2, L2Init, Parseval, StreamingEWC, Wasserstein


def row(*values):
    """A linear layer with one output and these weights."""
    return weighing([values])


def weighing(values):
    matrix = torch.tensor(values, dtype=torch.float64)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False).double()
    layer.weight = nn.Parameter(matrix)
    return layer


def put(layer, values):
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values, dtype=torch.float64))


def gradient(mitigator, layer, given=None):
    """What the layer's weight has as gradient before a step, having had `given`."""
    layer.weight.grad = torch.zeros_like(layer.weight) if given is None else torch.tensor(given, dtype=torch.float64)
    mitigator.before_step(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    return layer.weight.grad.tolist()


def grow(layer, rows):
    """What a growing head does: another parameter under the same name, with rows appended."""
    values = torch.cat((layer.weight.detach(), torch.tensor(rows, dtype=torch.float64)))
    layer.weight, layer.out_features = nn.Parameter(values), len(values)


def test_l2_is_the_sum_of_squares():
    layer = row(3.0, -4.0)
    assert L2(1.0).penalty(layer) == 25
    assert gradient(L2(0.5), layer) == [[3.0, -4.0]]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_l2_is_weight_decay_of_twice_its_strength_also_for_a_head_that_is_not_in_use(optimizer, make):
    decayed = make(lambda: nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])).double()
    regularised, before = copy.deepcopy(decayed), copy.deepcopy(decayed)
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for heads, decay in ((decayed, 0.2), (regularised, 0.0)):
        steps = optimizer(heads.parameters(), lr=0.1, weight_decay=decay)
        if not decay:
            L2(0.1).attach(steps, heads)
        for _ in range(5):
            steps.zero_grad()
            heads[0](inputs).square().mean().backward()
            steps.step()
    assert torch.equal(regularised[1].weight, before[1].weight)
    for ours, theirs in zip(regularised.parameters(), decayed.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_l2_init_is_the_squared_distance_to_where_training_began():
    layer, mitigator = row(1.0, 2.0), L2Init(0.5)
    mitigator.prepare(layer)
    put(layer, [[4.0, -2.0]])
    assert mitigator.penalty(layer) == 25
    assert gradient(mitigator, layer) == [[3.0, -4.0]]


@pytest.mark.parametrize("kind", [L2Init, lambda strength: Wasserstein(strength, resort=1)])
def test_rows_that_grow_count_from_when_they_are_first_seen(kind):
    layer, mitigator = row(0.0, 1.0), kind(0.5)
    mitigator.prepare(layer)
    put(layer, [[0.0, 3.0]])
    grow(layer, [[10.0, 11.0]])
    mitigator.prepare(layer)
    assert mitigator.penalty(layer) == 4
    put(layer, [[0.0, 3.0], [10.0, 12.0]])
    assert mitigator.penalty(layer) == 5
    assert gradient(mitigator, layer) == [[0.0, 2.0], [0.0, 1.0]]


def test_wasserstein_compares_sorted_entries():
    layer, mitigator = row(1.0, 5.0, 3.0), Wasserstein(0.5, resort=1)
    mitigator.prepare(layer)
    put(layer, [[4.0, 2.0, 9.0]])  # 2 4 9 against 1 3 5
    assert mitigator.penalty(layer) == 1 + 1 + 16
    assert gradient(mitigator, layer) == [[1.0, 1.0, 4.0]]


def test_wasserstein_lets_entries_trade_places_where_l2_init_does_not():
    layer = row(1.0, 5.0, 3.0)
    mitigator, distance = Wasserstein(1.0, resort=1), L2Init(1.0)
    for one in (mitigator, distance):
        one.prepare(layer)
    put(layer, [[3.0, 1.0, 5.0]])
    assert mitigator.penalty(layer) == 0
    assert distance.penalty(layer) == 4 + 16 + 4
    assert gradient(mitigator, layer) == [[0.0, 0.0, 0.0]]


def test_wasserstein_is_the_number_of_entries_times_the_distance_that_scipy_computes():
    from scipy.stats import wasserstein_distance

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    layer, mitigator = weighing(first.tolist()), Wasserstein(1.0)
    mitigator.prepare(layer)
    shift = layer.weight.detach().roll(3) + 0.25  # for a translation, W₂ and W₁ are both its length
    put(layer, shift.tolist())
    distance = wasserstein_distance(first.flatten(), shift.flatten())
    assert mitigator.penalty(layer).item() == pytest.approx(40 * distance**2, rel=1e-12)


def test_wasserstein_sees_a_layer_anew_that_another_of_as_many_entries_replaces():
    layer, mitigator = weighing([[1.0, 5.0, 3.0], [2.0, 4.0, 6.0]]), Wasserstein(0.5, resort=1)
    gradient(mitigator, layer)
    layer.weight = nn.Parameter(torch.tensor([[10.0, 30.0], [20.0, 60.0], [50.0, 40.0]], dtype=torch.float64))
    assert mitigator.penalty(layer) == 0
    assert gradient(mitigator, layer) == [[0.0, 0.0]] * 3


def test_between_two_sorts_the_pull_is_that_of_an_upper_bound():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(20, 1, 30, generator=generator, dtype=torch.float64)
    layer, mitigator = weighing(draws[0].tolist()), Wasserstein(0.5, resort=4)
    mitigator.prepare(layer)
    excess = []
    for draw in draws[1:]:
        put(layer, draw.tolist())
        bound = torch.tensor(gradient(mitigator, layer), dtype=torch.float64).square().sum()
        excess.append(bound.item() - mitigator.penalty(layer).item())
    assert all(excess[n] == pytest.approx(0, abs=1e-9) for n in range(0, 19, 4))
    assert all(excess[n] > 1 for n in range(19) if n % 4)


def test_ranks_that_are_kept_are_in_the_state():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(12, 1, 30, generator=generator, dtype=torch.float64).tolist()
    layer, mitigator = weighing(draws[0]), Wasserstein(0.5, resort=4)
    mitigator.prepare(layer)
    for draw in draws[1:3]:
        put(layer, draw)
        gradient(mitigator, layer)
    again = Wasserstein(0.5, resort=4)
    again.load_state_dict(mitigator.state_dict())
    for draw in draws[3:]:
        put(layer, draw)
        assert gradient(again, layer) == gradient(mitigator, layer)


def test_parseval_is_the_distance_of_the_gram_matrix_from_the_identity():
    assert Parseval(1.0).penalty(weighing([[1.0, 0.0], [1.0, 2.0]])) == 0 + 1 + 1 + 16  # W Wᵀ = [[1, 1], [1, 5]]
    assert gradient(Parseval(0.25), weighing([[3.0]])) == [[24.0]]  # (9 − 1) 3
    assert gradient(Parseval(0.25, scale=4.0), weighing([[3.0]])) == [[15.0]]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_parseval_is_zero_for_orthogonal_matrices_only_and_pulls_singular_values_to_the_root_of_the_scale(shape):
    generator = torch.Generator().manual_seed(0)
    layer = weighing(torch.randn(*shape, generator=generator, dtype=torch.float64).tolist())
    mitigator = Parseval(0.01, scale=4.0)
    for _ in range(2000):
        change = torch.tensor(gradient(mitigator, layer), dtype=torch.float64)
        put(layer, (layer.weight - change).tolist())
    torch.testing.assert_close(torch.linalg.svdvals(layer.weight.detach()), torch.full((min(shape),), 2.0).double())
    assert mitigator.penalty(layer) < 1e-12


def test_the_smaller_gram_of_a_tall_matrix_differs_by_a_constant():
    tall = weighing([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    whole = (tall.weight @ tall.weight.T - 2 * torch.eye(3)).square().sum()
    assert Parseval(1.0, scale=2.0).penalty(tall) == whole - 2**2 * (3 - 2)


def test_parseval_takes_query_key_and_value_one_by_one_and_convolutions_as_matrices(make):
    attention = make(lambda: nn.MultiheadAttention(4, 2)).double()
    parts = [*attention.in_proj_weight.chunk(3), attention.out_proj.weight]
    expected = sum((part @ part.T - torch.eye(4)).square().sum() for part in parts)
    torch.testing.assert_close(Parseval(1.0).penalty(attention), expected)
    convolution = make(lambda: nn.Conv2d(2, 3, 3)).double()
    matrix = convolution.weight.view(3, 18)
    expected = (matrix @ matrix.T - torch.eye(3)).square().sum()
    torch.testing.assert_close(Parseval(1.0).penalty(convolution), expected)


def test_parseval_refuses_a_model_without_a_matrix():
    with pytest.raises(ValueError, match="no trainable weight matrix"):
        Parseval(1.0).prepare(nn.LayerNorm(3))


def test_streaming_ewc_on_paper():
    layer = row(1.0)
    mitigator = StreamingEWC(2.0, importance_decay=0.5, anchor_decay=0.75)
    assert gradient(mitigator, layer, [[3.0]]) == [[3.0]]  # F̂ = 9, θ̄ = θ
    put(layer, [[5.0]])
    assert mitigator.penalty(layer) == 0.5 * 9 * 16
    # F = ½ · 4.5 + ½ · 1, F̂ = F / (1 − ¼) = 11/3, θ̄ = 1 still
    assert gradient(mitigator, layer, [[1.0]])[0] == pytest.approx([1 + 2 * 11 / 3 * 4])
    # now θ̄ = ¾ + ¼ · 5 = 2
    assert mitigator.penalty(layer).item() == pytest.approx(0.5 * 11 / 3 * 9)


def test_the_importance_of_a_constant_gradient_is_its_square_from_the_first_step():
    layer, mitigator = row(1.0), StreamingEWC(5.0, anchor_decay=0.0)
    for n in range(5):
        put(layer, [[1.0 + n]])
        found = gradient(mitigator, layer, [[2.0]])[0][0]  # θ̄ is the θ of the step before
        assert found == pytest.approx(2.0 + (5 * 4 * 1 if n else 0))


def test_a_parameter_that_training_gave_no_gradient_has_no_importance_and_keeps_its_own():
    layer, mitigator = row(1.0), StreamingEWC(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mitigator.before_step(layer, optimizer)
    assert layer.weight.grad is None
    assert mitigator.penalty(layer) == 0
    gradient(mitigator, layer, [[3.0]])
    layer.weight.grad = None
    mitigator.before_step(layer, optimizer)
    put(layer, [[2.0]])
    assert mitigator.counts == {"weight": 1}
    assert mitigator.penalty(layer).item() == pytest.approx(0.5 * 9)


def test_grown_rows_have_no_importance_until_they_have_a_gradient():
    layer, mitigator = row(1.0), StreamingEWC(1.0, importance_decay=0.5)
    gradient(mitigator, layer, [[4.0]])
    grow(layer, [[7.0]])
    put(layer, [[1.0], [9.0]])
    assert mitigator.penalty(layer) == 0
    gradient(mitigator, layer, [[4.0], [0.0]])
    assert mitigator.importances["weight"].tolist() == [[12.0], [0.0]]


def test_the_importance_of_grown_rows_is_the_square_of_a_constant_gradient_from_their_first_step():
    layer, mitigator = row(1.0), StreamingEWC(1.0, anchor_decay=1 - 1e-12)
    for _ in range(100):
        gradient(mitigator, layer, [[2.0]])
    grow(layer, [[7.0]])
    for _ in range(3):
        gradient(mitigator, layer, [[2.0], [2.0]])
    put(layer, [[1.0 + 3], [7.0 + 5]])
    assert mitigator.penalty(layer).item() == pytest.approx(0.5 * 4 * (9 + 25))
    pulled = gradient(mitigator, layer, [[2.0], [2.0]])
    assert pulled == [[pytest.approx(2 + 4 * 3)], [pytest.approx(2 + 4 * 5)]]
    again = StreamingEWC(1.0)
    again.load_state_dict(copy.deepcopy(mitigator.state_dict()))
    assert again.penalty(layer) == mitigator.penalty(layer)
    mitigator.counts["weight"] += 1
    assert again.counts["weight"].tolist() == [[104.0], [4.0]]


def test_the_importances_of_a_layer_that_another_replaces_start_anew():
    layer, mitigator = row(1.0, 2.0), StreamingEWC(1.0, anchor_decay=0.999999999999)
    for _ in range(50):
        gradient(mitigator, layer, [[3.0, 3.0]])
    layer.weight = nn.Parameter(torch.tensor([[5.0]], dtype=torch.float64))
    assert mitigator.penalty(layer) == 0
    gradient(mitigator, layer, [[2.0]])
    put(layer, [[6.0]])
    assert mitigator.penalty(layer).item() == pytest.approx(0.5 * 4)
