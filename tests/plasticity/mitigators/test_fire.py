import copy
import math

import pytest
import torch
from torch import nn

from avalanche_curv import FIRE, AfterTask, EverySteps, MitigatorPlugin
from avalanche_curv.plasticity.mitigators.fire import newton_schulz

WHOLE = 60  # iterations after which rounding is all that is left


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar(matrix):
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def close(found, expected):
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6), (6, 1)])
def test_the_limit_is_the_polar_factor_of_the_singular_value_decomposition(shape):
    matrix = drawn(*shape)
    found = newton_schulz(matrix, WHOLE)
    close(found, polar(matrix))
    smaller = found @ found.T if shape[0] <= shape[1] else found.T @ found
    close(smaller, torch.eye(min(shape), dtype=torch.float64))


def test_each_iteration_moves_singular_values_by_the_cubic_and_keeps_the_vectors():
    matrix = drawn(4, 6)
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    sizes = [size / math.sqrt(sum(s**2 for s in sizes.tolist())) for size in sizes.tolist()]
    for iterations in range(11):
        close(newton_schulz(matrix, iterations), u @ torch.tensor(sizes, dtype=torch.float64).diag() @ v)
        sizes = [1.5 * size - 0.5 * size**3 for size in sizes]


def test_ten_iterations_bring_what_is_more_than_a_fiftieth_near_one():
    for size, least, most in ((0.02, 0.8, 1.0), (0.1, 0.999, 1.0), (0.002, 0.0, 0.2)):
        matrix = torch.diag(torch.tensor([math.sqrt(1 - size**2), size])).double()
        assert least < newton_schulz(matrix, 10)[1, 1] <= most


def test_no_other_isometry_is_nearer():
    matrix = drawn(6, 4)
    least = (matrix - newton_schulz(matrix, WHOLE)).square().sum()
    for seed in range(50):
        other = torch.linalg.qr(drawn(6, 4, seed=seed + 1)).Q
        near = polar(polar(matrix) + 0.01 * other)
        assert (matrix - other).square().sum() > least
        assert (matrix - near).square().sum() > least


@pytest.mark.parametrize("part", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_layer_goes_a_part_of_the_way_to_its_scaled_isometry_and_biases_stay(part, shape, make):
    layer = make(lambda: nn.Linear(shape[1], shape[0]).double())
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    FIRE(part, iterations=WHOLE).apply(layer)
    close(layer.weight, (1 - part) * before + part * math.sqrt(shape[0] / shape[1]) * polar(before))
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize(
    "build", [lambda: nn.Conv2d(3, 5, (2, 3)), lambda: nn.ConvTranspose2d(3, 5, (2, 3)), lambda: nn.Conv1d(4, 2, 3)]
)
def test_a_convolution_is_replaced_place_by_place(build, make):
    layer = make(build).double()
    before = layer.weight.detach().clone()
    FIRE(iterations=WHOLE).apply(layer)
    turned = isinstance(layer, nn.ConvTranspose2d)
    places = [*torch.cartesian_prod(*map(torch.arange, before.shape[2:])).view(-1, before.ndim - 2).tolist()]
    for place in places:
        at = (slice(None), slice(None), *place)
        old, new = (weight[at].T if turned else weight[at] for weight in (before, layer.weight.detach()))
        close(new, polar(old) * math.sqrt(old.shape[0] / old.shape[1]) / len(places))


def test_a_convolution_enlarges_nothing_beyond_the_root_of_its_widths(make):
    layer = make(lambda: nn.Conv2d(3, 12, 3, padding=1, bias=False).double())
    layer.weight.data *= 10
    FIRE(iterations=WHOLE).apply(layer)
    x = drawn(1, 3, 8, 8).requires_grad_()
    for _ in range(30):  # power iteration
        y = layer(x / x.norm())
        (x,) = torch.autograd.grad(y, x, y)
        x = x.detach().requires_grad_()
    assert 0.5 < y.norm() <= math.sqrt(12 / 3)


def test_queries_keys_and_values_are_matrices_of_their_own(make):
    layer = make(lambda: nn.MultiheadAttention(4, 2).double())
    before = layer.in_proj_weight.detach().clone()
    FIRE(iterations=WHOLE).apply(layer)
    close(layer.in_proj_weight, torch.cat([polar(block) for block in before.chunk(3)]))


def test_it_acts_between_tasks_or_every_so_many_steps_on_selected_weights_that_the_optimiser_steps(make):
    def build():
        return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2))

    for when, acts in ((AfterTask(), "task"), (EverySteps(2), "steps")):
        model = make(build)
        model[2].weight.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD([*model[:3].parameters()], lr=0.0)
        fire = FIRE(when=when, exclude=("2",))
        changed = []
        with fire.attach(optimizer, model):
            for _ in range(2):
                model(torch.zeros(1, 4)).sum().backward()
                optimizer.step()
                changed.append({n for n, v in model.state_dict().items() if not torch.equal(v, before[n])})
        fire.after_task(model, optimizer)
        changed.append({n for n, v in model.state_dict().items() if not torch.equal(v, before[n])})
        assert changed == [set(), {"0.weight"} if acts == "steps" else set(), {"0.weight"}]
        assert fire.acts_between_tasks == (acts == "task")


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Adagrad, torch.optim.Rprop, torch.optim.ASGD]
)
def test_the_next_step_of_a_weight_that_is_replaced_is_the_first_of_a_new_optimiser(kind, make):
    model = make(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double())
    optimizer, x = kind(model.parameters(), lr=0.05), drawn(6, 4)

    def step(stepping, model):
        stepping.zero_grad()
        model(x).pow(3).mean().backward()
        stepping.step()

    for _ in range(3):
        step(optimizer, model)
    FIRE(0.5).after_task(model, optimizer)
    other = copy.deepcopy(model)
    step(optimizer, model)
    step(kind(other.parameters(), lr=0.05), other)
    assert torch.equal(model[0].weight, other[0].weight)
    if kind in (torch.optim.Adam, torch.optim.NAdam, torch.optim.Adagrad):  # moments of what is not replaced are kept
        assert not torch.equal(model[0].bias, other[0].bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_stays_and_zeros_stay(dtype, make):
    model = make(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).to(dtype)
    model[1].weight.data.zero_()
    FIRE(iterations=30).apply(model)
    assert model[0].weight.dtype == dtype
    gram = model[0].weight.float() @ model[0].weight.float().T
    torch.testing.assert_close(gram.detach(), torch.eye(4), rtol=0, atol=3e-2)
    assert not model[1].weight.any()


def test_what_cannot_work_is_refused_with_the_remedy(plane, learner):
    with pytest.raises(ValueError, match=r"no trainable weight matrix .* FIRE looks at no others. Let include"):
        FIRE().prepare(nn.LayerNorm(3))
    for make, error, message in (
        (lambda: FIRE(0.0), ValueError, "part must be a finite number, above 0, at most 1"),
        (lambda: FIRE(1.5), ValueError, "part must be a finite number, above 0, at most 1"),
        (lambda: FIRE(iterations=0), ValueError, "iterations must be an integer of at least 1"),
        (lambda: FIRE(when=3), TypeError, "when must be a Schedule"),
    ):
        with pytest.raises(error, match=message):
            make()
    with pytest.raises(ValueError, match="no trainable weight matrix"):
        learner(nn.Sequential(nn.LayerNorm(2)), MitigatorPlugin(FIRE())).train(plane.train_stream[0])
