"""Gradient projection memory: what enters the layers, from explicit inputs; and that old outputs stay as they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv import (
    EmpiricalRisk,
    Energy,
    FreezeUncovered,
    InputSpace,
    LeaveUncovered,
    NonFiniteCurvatureError,
    Rank,
    StepProjection,
)
from avalanche_curv.core.projection import GradientProjection, Projector, ProtectedSpace
from avalanche_curv.core.projection.subspace import principal_angles

EVERYTHING = Energy(1.0, most_pairs=10_000)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def risk_of(model, inputs, batch=3):
    targets = torch.arange(len(inputs)) % 3
    batches = list(zip(inputs.split(batch), targets.split(batch)))
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)


def learn(model, space, inputs, *, optimizer=None, projection=StepProjection(), steps=40):  # noqa: B008
    """Another task, in a plain loop."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 0.05)
    projector = Projector(space, projection)
    targets = torch.arange(len(inputs)) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        with projector.around_step(model):
            optimizer.step()


class Called(nn.Module):
    """Layers in a given order; one may be called twice, or share the weight of another."""

    def __init__(self, *order, tied=False):
        super().__init__()
        self.order = order
        for name in dict.fromkeys(order):
            self.add_module(name, nn.Linear(6, 6))
        self.last = nn.Linear(6, 3, bias=tied)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        for name in self.order:
            x = torch.relu(getattr(self, name)(x))
        return self.last(x)


class Conv1D(nn.Module):
    """That of GPT-2 in Hugging Face's library, by its name: x W + b with W [in, out]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Transposed(nn.Module):
    """Classes on the second axis."""

    def forward(self, x):
        return x.transpose(1, 2)


class Positions(nn.Module):
    """To each token its position is added, which is the same in all examples."""

    def __init__(self):
        super().__init__()
        self.mix, self.places, self.last = nn.Linear(9, 7), nn.Embedding(4, 7), nn.Linear(28, 3)

    def forward(self, x):
        return self.last(torch.relu(self.mix(x) + self.places(torch.arange(4))).flatten(1))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)), (12,)),
    "linear without biases": (
        lambda: nn.Sequential(nn.Linear(12, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False)), (12,)
    ),
    "strides, padding, dilation and groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(4, 6, (3, 2), dilation=2, padding=2, groups=2, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(6 * 4 * 6, 3),
        ),
        (2, 8, 8),
    ),
    "reflected borders": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(),
                              nn.Linear(4 * 36, 3)),
        (2, 6, 6),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)), (4, 4, 4)
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)), (3, 10)
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)), (4, 9)
    ),
    "transposed weights": (
        lambda: nn.Sequential(Conv1D(11, 12), nn.ReLU(), Conv1D(9, 11), nn.ReLU(), nn.Linear(9, 3)), (12,)
    ),
    "transposed weights on tokens": (
        lambda: nn.Sequential(Conv1D(7, 9), nn.ReLU(), nn.Flatten(), Conv1D(3, 28)), (4, 9)
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, 3)), (2, 4, 4)
    ),
    "positions": (Positions, (4, 9)),
    "called twice": (lambda: Called("first", "again", "again"), (6,)),
    "tied": (lambda: Called("first", "second", tied=True), (6,)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_all_outputs_for_past_inputs_stay_as_they_are(name, make_model):
    """In deep networks of ReLU, over two tasks, biases and weight decay included; those for others change."""
    make, shape = MODELS[name]
    model = make_model(make)
    space = ProtectedSpace()
    past, before = [], []
    for task in range(2):
        inputs = draws(2, *shape, seed=task)
        learn(model, space, inputs)
        space = space.absorb(risk_of(model, inputs), InputSpace(EVERYTHING))
        past.append(inputs)
        before.append(model(inputs).detach())
    new = draws(20, *shape, seed=9)
    change = model(new).detach()
    learn(model, space, new)
    for inputs, outputs in zip(past, before):
        torch.testing.assert_close(model(inputs), outputs, rtol=0, atol=1e-9)
    assert (model(new) - change).abs().max() > 0.01


def test_it_is_the_span_of_all_that_enters_a_layer(make_model):
    """By hand: (a, 1) for a linear layer, patches (a, 1) from unfold for a convolution."""
    model = make_model(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, bias=False)))
    inputs = draws(2, 2, 3, 3)
    space = ProtectedSpace().absorb(risk_of(model, inputs), InputSpace(EVERYTHING))
    patches = F.unfold(inputs, 2).transpose(1, 2).flatten(0, 1)
    patches = torch.cat([patches, torch.ones(len(patches), 1)], dim=1)
    hidden = model[:3](inputs).detach()
    for key, rows in (("0", patches), ("3", hidden)):
        exact = torch.linalg.qr(rows.T)[0].T
        found = space.blocks[key].subspace
        assert found.rank == len(exact)
        assert principal_angles(found.rows, exact).max() < 1e-7
        share = found.shares[0]
        moment = rows.T @ rows / len(rows)
        assert share.trace == pytest.approx(float(moment.trace()))
        torch.testing.assert_close(share.values, torch.linalg.eigvalsh(moment).flip(0)[: len(exact)])
    assert space.used == 3 * 8 + 3 * 2
    assert space.energy == pytest.approx(1)


def test_a_transposed_weight_is_protected_as_the_linear_layer_that_it_is(make_model):
    """The span of (a, 1) over tokens by hand; steps, bounds and memory as those of `nn.Linear` with Wᵀ."""
    layer = make_model(lambda: nn.Sequential(Conv1D(3, 8), nn.Tanh(), nn.Flatten(), Conv1D(3, 12)))
    linear = make_model(lambda: nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)))
    with torch.no_grad():
        for one, other in zip(layer, linear):
            if isinstance(other, nn.Linear):
                other.weight.copy_(one.weight.T)
                other.bias.copy_(one.bias)
    inputs = draws(2, 4, 8)
    space, expected = (ProtectedSpace().absorb(risk_of(m, inputs), InputSpace(EVERYTHING)) for m in (layer, linear))
    rows = torch.cat([inputs.flatten(0, 1), torch.ones(8, 1).double()], dim=1)
    found = space.blocks["0"].subspace
    assert principal_angles(found.rows, torch.linalg.qr(rows.T)[0].T).max() < 1e-7
    assert found.rank == 8
    assert space.used == expected.used == 3 * 8 + 3 * 2
    for task in range(1, 3):
        new = draws(4, 4, 8, seed=task)
        for model, own in ((layer, space), (linear, expected)):
            learn(model, own, new, steps=5)
        for one, other in zip(layer, linear):
            if isinstance(other, nn.Linear):
                torch.testing.assert_close(one.weight.T, other.weight, rtol=0, atol=1e-9)
                torch.testing.assert_close(one.bias, other.bias, rtol=0, atol=1e-9)
    assert InputSpace().bounds(risk_of(layer, inputs).space) == InputSpace().bounds(risk_of(linear, inputs).space)


def test_padding_does_not_enter_it(make_model):
    """What stands at tokens that the loss leaves out is as if it were not there."""
    model = make_model(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), Transposed()))
    tokens, labels = draws(2, 3, 6), torch.arange(6).view(2, 3) % 3
    filled = torch.cat([tokens, draws(2, 2, 6, seed=1)], dim=1)
    padded = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(filled, F.pad(labels, (0, 2), value=-100))])
    without = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(tokens, labels)])
    found, wanted = (ProtectedSpace().absorb(risk, InputSpace(Energy(0.9))).blocks for risk in (padded, without))
    for key, block in wanted.items():
        assert found[key].subspace.rank == block.subspace.rank
        assert principal_angles(found[key].subspace.rows, block.subspace.rows).max() < 1e-7
        torch.testing.assert_close(found[key].subspace.shares[0].values, block.subspace.shares[0].values)


@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.95])
def test_energy_keeps_the_fewest_directions_outside_of_what_is_held(fraction, make_model):
    """The paper's criterion: ‖R_proj‖² + ‖(R̂)_k‖² ≥ ε ‖R‖² for the smallest k (Saha et al. 2021, eq. 9)."""
    model = make_model(lambda: nn.Linear(10, 3, bias=False))
    scales = torch.logspace(0, -1.5, 10, dtype=torch.float64)
    first, second = draws(40, 10) * scales, draws(40, 10, seed=1) * scales.flip(0).sqrt()
    cut = InputSpace(Energy(fraction))
    one = ProtectedSpace().absorb(risk_of(model, first, 7), cut)
    two = one.absorb(risk_of(model, second, 7), cut)
    held = torch.zeros(0, 10, dtype=torch.float64)
    for space, rows in ((one, first), (two, second)):
        left = rows - rows @ held.T @ held
        _, values, directions = torch.linalg.svd(left, full_matrices=False)
        whole = rows.square().sum()
        k = next(k for k in range(11) if whole - left.square().sum() + values[:k].square().sum() >= fraction * whole)
        held = torch.linalg.qr(torch.cat([held, directions[:k]]).T)[0].T
        found = space.blocks[""].subspace
        assert found.rank == len(held) < 10
        assert principal_angles(found.rows, held).max() < 1e-6


def test_rank_keeps_the_top_directions_of_each_task(make_model):
    model, space, tops = make_model(lambda: nn.Linear(10, 3, bias=False)), ProtectedSpace(), []
    for task in range(2):
        rows = draws(40, 10, seed=task) * torch.logspace(0, -1, 10, dtype=torch.float64).roll(3 * task)
        space = space.absorb(risk_of(model, rows), InputSpace(Rank(2)))
        tops.append(torch.linalg.svd(rows)[2][:2])
    found = space.blocks[""].subspace.rows
    assert len(found) == 4
    assert principal_angles(found, torch.linalg.qr(torch.cat(tops).T)[0].T).max() < 1e-6


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_rank_beyond_that_of_the_inputs_closes_nothing_more(kind, make_model):
    """Inputs in three dimensions of ten, both where rows are few and where they are many."""
    basis = draws(3, 10, seed=5)
    for examples in (6, 60):
        model = make_model(lambda: nn.Linear(10, 3, bias=False)).to(kind)
        inputs = (draws(examples, 3) @ basis).to(kind)
        space = ProtectedSpace().absorb(risk_of(model, inputs), InputSpace(Rank(10)))
        assert space.blocks[""].subspace.rank == 3


def test_several_cuts_are_for_the_layers_in_order(make_model):
    model = make_model(lambda: nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))))
    space = ProtectedSpace().absorb(risk_of(model, draws(30, 6)), InputSpace((Rank(1), Rank(4), Rank(2))))
    assert [block.subspace.rank for block in space.blocks.values()] == [1, 4, 2, 2]
    assert InputSpace([Rank(1), Rank(4)]) == InputSpace((Rank(1), Rank(4)))


def test_batches_and_pieces_do_not_matter_and_examples_are_drawn_by_seed(make_model):
    model = make_model(lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)))
    inputs = draws(11, 1, 6)

    def bases(batch, **options):
        space = ProtectedSpace().absorb(risk_of(model, inputs, batch), InputSpace(Rank(2), **options))
        return [block.subspace.rows.T @ block.subspace.rows for block in space.blocks.values()]

    for one, other in zip(bases(11), bases(2)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for one, other, drawn in zip(bases(4, examples=5, seed=1), bases(11, examples=5, seed=1), bases(4, examples=5)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
        assert not torch.allclose(one, drawn, atol=1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.SGD(ps, 0.5, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1),
        lambda ps: torch.optim.RMSprop(ps, 0.1),
    ],
)
@pytest.mark.parametrize("biases", [True, False])
def test_where_inputs_span_everything_no_weight_moves(optimizer, biases, make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(5, 4, bias=biases), nn.Tanh(), nn.Linear(4, 3, bias=biases)))
    space = ProtectedSpace().absorb(risk_of(model, draws(30, 5)), InputSpace(EVERYTHING))
    before = [p.detach().clone() for p in model.parameters()]
    assert space.used == sum(p.numel() for p in before)
    learn(model, space, draws(30, 5, seed=1), optimizer=optimizer(model.parameters()))
    plain = torch.optim.SGD(model.parameters(), 0.5)
    learn(model, space, draws(30, 5, seed=1), optimizer=plain, projection=GradientProjection())
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ["tokens", "transposed", "positions", "called twice", "tied"])
def test_what_has_no_input_space_is_named_and_holds_still_or_is_left(name, make_model):
    make, shape = MODELS[name]
    expected = {
        "tokens": ("1.weight", "1.bias"),
        "transposed": ("0.weight", "0.bias"),
        "positions": ("places.weight",),
        "called twice": ("again.weight", "again.bias"),
        "tied": ("first.weight", "first.bias", "second.bias"),
    }[name]
    for uncovered, held in ((FreezeUncovered(), set(expected)), (LeaveUncovered(), set())):
        model = make_model(make)
        space = ProtectedSpace().absorb(risk_of(model, draws(2, *shape)), InputSpace(EVERYTHING), uncovered=uncovered)
        assert {*space.held.names} == held
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        learn(model, space, draws(20, *shape, seed=1), steps=3)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {*before} - held


def test_a_layer_that_was_never_called_stays_free(make_model):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 4)
            self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
            self.head = 0

        def forward(self, x):
            return self.heads[self.head](torch.relu(self.body(x)))

    model = make_model(Heads)
    space = ProtectedSpace().absorb(risk_of(model, draws(3, 6)), InputSpace(EVERYTHING))
    assert {*space.blocks} == {"body", "heads.0"}
    assert not space.held.names
    model.head = 1
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    other = make_model(Heads)
    other.head = 1
    for one, own in ((model, space), (other, ProtectedSpace())):
        learn(one, own, draws(9, 6, seed=1), optimizer=torch.optim.SGD(one.parameters(), 0.1), steps=1)
    assert torch.equal(model.heads[0].weight, before["heads.0.weight"])  # it has no gradient
    assert not torch.equal(model.body.weight, other.body.weight)
    assert torch.equal(model.heads[1].weight, other.heads[1].weight)  # as without protection


def test_layers_with_frozen_parts_are_protected_in_the_others(make_model):
    """With W frozen, W a + b stays for past inputs only where b stays; with b frozen, where ΔW a = 0."""
    model = make_model(MODELS["linear"][0])
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    past = draws(3, 12)
    space = ProtectedSpace().absorb(risk_of(model, past), InputSpace(EVERYTHING))
    assert [block.layout.space.names for block in space.blocks.values()] == [
        ("0.bias",), ("2.weight",), ("4.weight", "4.bias")
    ]  # fmt: skip
    before, outputs = [p.detach().clone() for p in model.parameters()], model(past).detach()
    learn(model, space, draws(20, 12, seed=1))
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert changed == [False, False, True, False, True, True]
    torch.testing.assert_close(model(past), outputs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["the first example", "a later example", "a weight", "the last weight", "a bias"])
def test_what_is_not_finite_is_refused(bad, place, make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)))
    inputs = draws(7, 12)
    with torch.no_grad():
        if "example" in place:
            inputs[0 if "first" in place else 5, 2] = bad
        elif "weight" in place:
            model[0 if place == "a weight" else 4].weight[1, 1] = bad
        else:  # of an infinite one the outputs are finite
            model[2].bias[0] = bad
            assert bool(model(inputs).isfinite().all()) == (bad == torch.inf)
    for cut in (Energy(0.9), Rank(2)):
        with pytest.raises(NonFiniteCurvatureError, match=r"NaN or infinity.* diverged weights"):
            ProtectedSpace().absorb(risk_of(model, inputs), InputSpace(cut))


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"cuts": ()}, ValueError, r"at least one cut, such as Energy\(0.95\)"),
        ({"cuts": Energy}, TypeError, r"Did you mean Energy\(0.95\)"),
        ({"cuts": (Rank(2), "all")}, TypeError, "got 'all'"),
        ({"examples": 0}, ValueError, "at least 1; got 0"),
        ({"seed": 1.5}, ValueError, "seed"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, error, remedy):
    with pytest.raises(error, match=remedy):
        InputSpace(**options)


def test_an_infinite_input_is_refused_where_the_outputs_are_finite(make_model):
    """tanh makes an infinity finite, and no layer explains its gradient."""
    model = make_model(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    inputs = torch.ones(6, 3, dtype=torch.float64)
    inputs[0, 1] = torch.inf
    risk = EmpiricalRisk.snapshot(model, nn.MSELoss(), [(inputs, torch.zeros(6, 2, dtype=torch.float64))])
    with pytest.raises(NonFiniteCurvatureError, match="NaN or infinity"):
        ProtectedSpace().absorb(risk, InputSpace())
