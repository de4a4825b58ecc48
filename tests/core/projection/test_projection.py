"""Eigenspaces against explicit matrices, projections against their products, and steps in plain loops."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv import (
    GGN,
    Dense,
    EmpiricalFisher,
    EmpiricalRisk,
    Energy,
    Fisher,
    Hessian,
    InputSpace,
    OutputGradient,
    ParameterSpace,
    PerLayer,
    PerParameter,
    Rank,
    WholeModel,
    estimate,
)
from avalanche_curv.core.projection import (
    Eigenspace,
    FreezeUncovered,
    GradientProjection,
    LeaveUncovered,
    Projector,
    ProtectedSpace,
    SequentialProjection,
    StepProjection,
)
from avalanche_curv.core.projection.blocks import Layout, ProtectedBlock
from avalanche_curv.core.projection.subspace import Subspace, principal_angles

KINDS = {
    "ggn": (GGN(), lambda paper: paper.ggns.mean(0)),
    "fisher": (Fisher(), lambda paper: paper.ggns.mean(0)),
    "empirical": (EmpiricalFisher(), lambda paper: paper.empirical_fishers.mean(0)),
    "hessian": (Hessian(), lambda paper: paper.hessians.mean(0)),
}

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1),
    "momentum and weight decay": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, 1e-2),
    "adam with its largest moments": lambda ps: torch.optim.Adam(ps, 1e-2, amsgrad=True, weight_decay=1e-2),
    "adamw": lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 1e-2, momentum=0.5),
}

PROJECTIONS = [StepProjection(), GradientProjection(), SequentialProjection()]

FAMILY = {
    "flat": Eigenspace(Fisher(), Rank(12)),
    "per layer": Eigenspace(Fisher(), Rank(6), PerLayer()),
    "inputs": InputSpace(Energy(0.9)),
    "outputs": Eigenspace(OutputGradient(), Rank(20), examples=20),
}


def draws(*shape, seed=0, kind=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(kind)


def risk_of(model, inputs, criterion=None, targets=None):
    targets = torch.arange(len(inputs)) % 3 if targets is None else targets
    return EmpiricalRisk.snapshot(model, criterion or nn.CrossEntropyLoss(), [(inputs, targets)])


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def values_of(space, model):
    return {name: value.clone() for name, value in space.values(model).items()}


def learn(model, optimizer, inputs, projector=None, steps=200, criterion=F.cross_entropy, targets=None):
    targets = torch.arange(len(inputs)) % 3 if targets is None else targets
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        if projector is None:
            optimizer.step()
        else:
            with projector.around_step(model):
                optimizer.step()


# What is protected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 5])
def test_rows_are_the_top_eigenvectors_of_the_dense_curvature(kind, count, problem):
    given = problem("mlp", "cross_entropy")
    curvature, on_paper = KINDS[kind]
    dense = on_paper(given.paper)
    space = ProtectedSpace().absorb(given.risk, Eigenspace(curvature, Rank(count)))
    values, vectors = torch.linalg.eigh(dense)
    top = values.abs().argsort(descending=True)[:count]
    found = space.blocks[""].subspace
    torch.testing.assert_close(found.rows.T @ found.rows, vectors[:, top] @ vectors[:, top].T, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.shares[0].values, values[top].abs())
    if kind == "hessian":
        assert math.isnan(space.energy)  # traces of indefinite matrices tell nothing
    else:
        assert space.energy == pytest.approx(float(values[top].sum() / dense.trace()))


@pytest.mark.parametrize(("per", "groups"), [(PerLayer(), [25, 18]), (PerParameter(), [20, 5, 15, 3])])
def test_rows_per_layer_are_those_of_the_diagonal_blocks(per, groups, problem):
    given = problem("mlp", "mean_square")
    dense = given.paper.ggns.mean(0)
    space = ProtectedSpace().absorb(given.risk, Eigenspace(GGN(), Rank(3), per))
    assert [block.layout.space.size for block in space.blocks.values()] == groups
    start, kept = 0, 0.0
    for size, block in zip(groups, space.blocks.values()):
        values, vectors = torch.linalg.eigh(dense[start : start + size, start : start + size])
        top = vectors[:, -3:]
        rows = block.subspace.rows
        torch.testing.assert_close(rows.T @ rows, top @ top.T, rtol=0, atol=1e-8)
        start, kept = start + size, kept + float(values[-3:].sum())
    assert space.energy == pytest.approx(kept / float(dense.trace()))
    assert space.used == 3 * len(groups)


def test_energy_keeps_the_fewest_eigenvectors_that_hold_it(problem):
    given = problem("mlp", "cross_entropy")
    values = torch.linalg.eigvalsh(given.paper.ggns.mean(0)).flip(0)
    space = ProtectedSpace().absorb(given.risk, Eigenspace(GGN(), Energy(0.9)))
    assert space.used == int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    assert 0.9 <= space.energy < 0.9 + float(values[space.used - 1] / values.sum())


def test_orthogonal_gradient_descent_keeps_the_span_of_true_output_gradients(make_model):
    """Against the gradients of f_y(x), one example after another."""
    model = make_model(mlp)
    inputs = draws(7, 8)
    targets = torch.arange(7) % 3
    gradients = []
    for x, y in zip(inputs, targets):
        parts = torch.autograd.grad(model(x[None])[0, y], model.parameters())
        gradients.append(torch.cat([part.reshape(-1) for part in parts]))
    exact = torch.linalg.qr(torch.stack(gradients).T)[0].T
    space = ProtectedSpace().absorb(risk_of(model, inputs), Eigenspace(OutputGradient(), Rank(7), examples=7))
    assert space.used == 7
    assert principal_angles(space.blocks[""].subspace.rows, exact).max() < 1e-6


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [4, 100])
def test_directions_without_curvature_stay_free(kind, hidden, make_model):
    """Five examples bend the loss in five directions, ten with softmax's two for each, in each block at most."""
    model = make_model(lambda: nn.Sequential(nn.Linear(8, hidden), nn.Tanh(), nn.Linear(hidden, 3))).to(kind)
    risk = risk_of(model, draws(5, 8, kind=kind))
    for per, blocks in ((WholeModel(), 1), (PerLayer(), 2)):
        for curvature, rank in ((OutputGradient(), 5), (EmpiricalFisher(), 5), (GGN(), 10)):
            space = ProtectedSpace().absorb(risk, Eigenspace(curvature, Rank(14), per))
            assert space.used == rank * blocks
            assert space.energy == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("per", [WholeModel(), PerLayer()])
def test_but_a_rank_of_all_directions_closes_all(per, make_model):
    """Also those along which five examples do not bend the loss at all."""
    protection = Eigenspace(OutputGradient(), Rank(1000), per)
    space = ProtectedSpace().absorb(risk_of(make_model(mlp), draws(5, 8)), protection)
    assert space.used == 195
    assert all(block.subspace.is_whole for block in space.blocks.values())
    assert space.energy == pytest.approx(1)


def test_examples_are_drawn_by_seed_and_experience(make_model):
    risk = risk_of(make_model(mlp), draws(40, 8))

    def basis(seed, before=0):
        space = ProtectedSpace(experiences=before).absorb(risk, Eigenspace(cut=Rank(3), examples=10, seed=seed))
        return space.blocks[""].subspace.rows

    assert torch.equal(basis(1), basis(1))
    for other in (basis(2), basis(1, before=1)):
        assert principal_angles(basis(1), other).max() > 0.01


def absorbed(model, protection, tasks, **options):
    """(the space of so many tasks of 20 examples each, that of each task alone)."""
    space, alone = ProtectedSpace(), []
    for task in range(tasks):
        risk = risk_of(model, draws(20, 8, seed=task))
        space = space.absorb(risk, protection, **options)
        alone.append(ProtectedSpace().absorb(risk, protection))
    return space, alone


def test_a_limit_bounds_each_basis_and_energy_says_what_is_left(make_model):
    model, protection = make_model(mlp), Eigenspace(cut=Rank(6), per=PerLayer())
    space, _ = absorbed(model, protection, 4, max_rank=9)
    assert [block.subspace.rank for block in space.blocks.values()] == [9, 9]
    assert 0.3 < space.energy < absorbed(model, protection, 4)[0].energy < 1
    assert space.experiences == 4
    assert space.tasks == (0, 1, 2, 3)


def test_angles_between_tasks_are_those_of_their_eigenspaces(make_model):
    space, alone = absorbed(make_model(mlp), Eigenspace(cut=Rank(4)), 3)
    expected = principal_angles(*(alone[task].blocks[""].subspace.rows for task in (0, 2)))
    torch.testing.assert_close(space.angles(0, 2), expected, rtol=0, atol=1e-7)
    assert expected.max() > 0.1
    assert space.angles(1, 1).max() < 1e-6
    assert space.angles(0, 7).shape == (0,)


def test_angles_of_what_a_limit_has_left_by_hand():
    """Of {e0, e1} and {e1, e2} the plane {e1, e2} is kept, so {e1} is left of the first task, and lies in the second's;
    a third along e0 + e1 comes down to the same."""
    e = torch.eye(3, dtype=torch.float64)
    union = Subspace.empty(e[0]).plus(e[:2], torch.tensor([1.0, 5.0])).plus(e[1:], torch.tensor([4.0, 3.0]), task=1)
    union = union.plus((e[:1] + e[1:2]) / 2**0.5, torch.tensor([1.0]), task=2).limited(2)
    layout = Layout(ParameterSpace(("weight",), (torch.Size([3]),)))
    space = ProtectedSpace({"": ProtectedBlock(layout, union)}, experiences=3)
    for first, second, count in ((0, 0, 1), (1, 1, 2), (0, 1, 1), (1, 0, 1), (0, 2, 1), (2, 1, 1)):
        angles = space.angles(first, second)
        assert angles.shape == (count,)
        assert angles.max() < 0.1


def test_the_same_task_absorbed_again_closes_nothing_more(make_model):
    risk = risk_of(make_model(mlp), draws(20, 8))
    for protection in FAMILY.values():
        once = ProtectedSpace().absorb(risk, protection)
        twice = once.absorb(risk, protection)  # all 20 examples, fewer than the 300 that may be drawn
        assert twice.used == once.used
        for key in once.blocks:
            assert twice.blocks[key].subspace.rows is once.blocks[key].subspace.rows


# Steps


@pytest.fixture
def protected(make_model):
    """protected(protection, kind=float64) -> (model, the space of its first 20 examples)."""

    def prepared(protection, kind=torch.float64):
        model = make_model(mlp).to(kind)
        return model, ProtectedSpace().absorb(risk_of(model, draws(20, 8, kind=kind)), protection)

    return prepared


@pytest.fixture
def two_tasks(make_model):
    """(model, inputs of the second task, protected space of the first), in float32; momentum is old."""

    def prepared(protection, make_optimizer):
        model = make_model(mlp).float()
        optimizer = make_optimizer(model.parameters())
        learn(model, optimizer, draws(20, 8, kind=torch.float32), steps=20)
        space = ProtectedSpace().absorb(risk_of(model, draws(20, 8, kind=torch.float32)), protection)
        return model, optimizer, space

    return prepared


def length(step):
    return math.sqrt(sum(float(part.double().square().sum()) for part in step.values()))


class Steps:
    """Measures some steps of a projector, of the protected parameters."""

    def __init__(self, projector, model):
        self.projector, self.model, self.inside, self.total = projector, model, [], []
        self.start, self.count = values_of(projector.space, model), 0

    @contextmanager
    def around_step(self, model):
        self.count += 1
        if self.count % 20:
            with self.projector.around_step(model):
                yield
            return
        before = values_of(self.projector.space, model)
        with self.projector.around_step(model):
            yield
        now = values_of(self.projector.space, model)
        self.total.append(length({name: now[name].double() - before[name] for name in now}))
        self.inside.append(self.projector.space.leakage(now, before) * self.total[-1])

    @property
    def drift(self):
        return self.projector.space.leakage(values_of(self.projector.space, self.model), self.start)


@pytest.mark.parametrize(
    ("optimizer", "protection"),
    [*((name, "flat") for name in OPTIMIZERS), *((name, kind) for name in ("momentum and weight decay", "adamw")
                                                 for kind in ("per layer", "inputs", "outputs"))],
)  # fmt: skip
def test_the_drift_stays_out_of_the_protected_space_under_every_optimiser(optimizer, protection, two_tasks):
    """‖U Δ‖ / ‖Δ‖ ≤ 1e-6 in float32 after 200 steps, with momentum that is older than the basis; a single step leaves
    no more in it than what the parameters are rounded by."""
    model, optimizer, space = two_tasks(FAMILY[protection], OPTIMIZERS[optimizer])
    steps = Steps(Projector(space, StepProjection()), model)
    learn(model, optimizer, draws(30, 8, seed=5, kind=torch.float32), steps)
    assert steps.drift <= 1e-6
    size = length({name: p.detach() for name, p in model.named_parameters()})
    rounding = torch.finfo(torch.float32).eps
    for inside, total in zip(steps.inside, steps.total):
        assert inside <= rounding * size + 1e-6 * total
    assert min(steps.total) > 0
    assert len(steps.total) == 10


def test_rounding_does_not_add_up_over_steps_where_many_dimensions_are_closed(protected):
    """In float32, after a thousand steps as after one: within what the parameters are rounded by."""
    model, space = protected(FAMILY["inputs"], torch.float32)
    start, size = values_of(space, model), float(space.space.vector(model).norm())
    projector = Projector(space, StepProjection())
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        with projector.around_step(model), torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
    step = {name: value - start[name] for name, value in space.values(model).items()}
    inside = space.leakage(step, {name: torch.zeros_like(part) for name, part in step.items()}) * length(step)
    assert inside < 0.3 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("protection", ["flat", "inputs"])
def test_a_task_goes_on_bit_identically_from_the_states_of_its_space_and_projector(protection, protected):
    ends = []
    for through in ((), ("space",), ("space", "projector")):
        model, space = protected(FAMILY[protection], torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        projector = Projector(space, StepProjection())
        learn(model, optimizer, draws(9, 8, seed=1, kind=torch.float32), projector, steps=5)
        if through:
            again = Projector(ProtectedSpace.load_state_dict(space.state_dict()), StepProjection())
            if "projector" in through:
                again.load_state_dict(projector.state_dict())
            projector = again
        learn(model, optimizer, draws(9, 8, seed=1, kind=torch.float32), projector, steps=5)
        ends.append(space.space.vector(model))
    unbroken, without_rest, resumed = ends
    assert torch.equal(resumed, unbroken)
    assert not torch.equal(without_rest, unbroken)
    with pytest.raises(ValueError, match=r"another space than ProtectedSpace\(\). Load that before"):
        Projector(ProtectedSpace(), StepProjection()).load_state_dict(projector.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_float64_each_step_does(optimizer, protected):
    model, space = protected(FAMILY["flat"])
    steps = Steps(Projector(space, StepProjection()), model)
    learn(model, OPTIMIZERS[optimizer](model.parameters()), draws(30, 8, seed=5), steps, steps=60)
    assert max(i / t for i, t in zip(steps.inside, steps.total)) < 1e-10


@pytest.mark.parametrize("protection", ["flat", "inputs"])
def test_projected_gradients_are_exact_for_plain_sgd_alone(protection, two_tasks):
    drifts = {}
    for name, make_optimizer in OPTIMIZERS.items():
        model, optimizer, space = two_tasks(FAMILY[protection], make_optimizer)
        steps = Steps(Projector(space, GradientProjection()), model)
        learn(model, optimizer, draws(30, 8, seed=5, kind=torch.float32), steps, steps=60)
        drifts[name] = steps.drift
    assert drifts.pop("sgd") <= 1e-6
    assert min(drifts.values()) > 1e-3


def test_one_step_of_sgd_is_the_projected_gradient(protected):
    """θ − η (I − UᵀU) g, by the projection of the step and of the gradient."""
    model, space = protected(FAMILY["flat"])
    other, rows = risk_of(model, draws(30, 8, seed=5)), space.blocks[""].subspace.rows
    gradient = other.gradient()
    expected = other.anchor - 0.1 * (gradient - rows.T @ (rows @ gradient))
    for projection in (StepProjection(), GradientProjection()):
        one = copy.deepcopy(model)
        learn(one, torch.optim.SGD(one.parameters(), 0.1), draws(30, 8, seed=5), Projector(space, projection), steps=1)
        torch.testing.assert_close(other.space.vector(one), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [0.1, 0.7, math.pi / 3, math.pi / 2])
def test_sequential_projections_leak_by_the_closed_form_on_two_lines(angle, make_model):
    """P₂P₁ g is the part of g = (g₁, g₂) that is left: with v₁ = e₁ and v₂ = (c, s), P₁g = (0, g₂), then P₂P₁g =
    g₂ (−c s, c²). So v₁ᵀP₂P₁g = −c s g₂, which leaks c s of g₂, and all of it relative to length: |s|."""
    model, space = make_model(lambda: nn.Linear(2, 1, bias=False)), ProtectedSpace()
    c, s = math.cos(angle), math.sin(angle)
    for line in ([1.0, 0.0], [c, s]):  # squared error of one input bends along it alone
        risk = risk_of(model, torch.tensor([line], dtype=torch.float64), nn.MSELoss(), torch.zeros(1, 1).double())
        space = space.absorb(risk, Eigenspace(GGN(), Rank(1)))
    start = model.weight.detach().clone()
    step = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    projector = Projector(space, SequentialProjection())
    with projector.around_step(model), torch.no_grad():
        model.weight += step
    expected = -0.8 * torch.tensor([[-c * s, c * c]], dtype=torch.float64)
    torch.testing.assert_close(model.weight.detach() - start, expected, rtol=0, atol=1e-12)
    with Projector(space, StepProjection()).around_step(model), torch.no_grad():
        before = model.weight.detach().clone()
        model.weight += step
    assert torch.equal(model.weight, before)  # two lines span the plane


def test_sequential_projections_are_a_product_of_projections(make_model):
    model = make_model(mlp)
    space, alone = absorbed(model, Eigenspace(cut=Rank(5)), 3)
    start = space.space.vector(model)
    step = draws(len(start), seed=7)
    expected = step
    for one in alone:
        rows = one.blocks[""].subspace.rows
        expected = expected - rows.T @ (rows @ expected)
    with Projector(space, SequentialProjection()).around_step(model), torch.no_grad():
        for parameter, part in zip(model.parameters(), space.space.split(step)):
            parameter += part
    torch.testing.assert_close(space.space.vector(model) - start, expected, rtol=0, atol=1e-8)
    moved = dict(zip(space.space.names, space.space.split(expected)))
    leak = space.leakage(moved, {name: torch.zeros_like(part) for name, part in moved.items()})
    union = space.blocks[""].subspace.rows
    assert leak == pytest.approx(float((union @ expected).norm() / expected.norm()))
    assert leak > 0.05


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_quadratic_past_loss_is_left_as_it_is(kind, optimizer, make_model):
    """A linear model with squared error: its loss is quadratic, of rank 3 · 5 in 27 parameters."""
    model = make_model(lambda: nn.Linear(8, 3)).to(kind)
    past, targets = draws(5, 8, kind=kind), draws(5, 3, seed=1, kind=kind)
    criterion = nn.MSELoss()
    old = risk_of(model, past, criterion, targets)
    for curvature in (GGN(), Hessian()):
        own = copy.deepcopy(model)
        space = ProtectedSpace().absorb(old, Eigenspace(curvature, Rank(15)))
        before = criterion(own(past), targets).item()
        learn(
            own, OPTIMIZERS[optimizer](own.parameters()), draws(9, 8, seed=2, kind=kind),
            Projector(space, StepProjection()),
            criterion=F.mse_loss, targets=draws(9, 3, seed=3, kind=kind), steps=40,
        )  # fmt: skip
        change = abs(criterion(own(past), targets).item() - before)
        assert change < 40 * torch.finfo(kind).eps * max(1.0, before)  # each step rounds the parameters
        assert any((a - b).abs().max() > 0.05 for a, b in zip(model.parameters(), own.parameters()))


@pytest.mark.parametrize("per", [WholeModel(), PerLayer()])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_a_full_basis_no_parameter_moves(per, optimizer, make_model):
    """To the bit; under plain SGD also with projected gradients."""
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))).float()
    risk = risk_of(model, draws(20, 4, kind=torch.float32), nn.MSELoss(), draws(20, 3, kind=torch.float32))
    space = ProtectedSpace().absorb(risk, Eigenspace(GGN(), Rank(27), per))
    assert space.used == 27
    before = [p.detach().clone() for p in model.parameters()]
    for projection in (StepProjection(), GradientProjection()) if optimizer == "sgd" else (StepProjection(),):
        projector = Projector(space, projection)
        learn(model, OPTIMIZERS[optimizer](model.parameters()), draws(9, 4, kind=torch.float32), projector, steps=20)
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_empty_space_changes_nothing(projection, make_model):
    """Not even the last bit, nor gradients that are None."""
    model, plain = make_model(mlp), make_model(mlp)
    for one, projector in ((model, Projector(ProtectedSpace(), projection)), (plain, None)):
        unused = nn.Parameter(torch.ones(2))
        optimizer = OPTIMIZERS["momentum and weight decay"]([*one.parameters(), unused])
        one.register_parameter("unused", unused)
        learn(one, optimizer, draws(9, 8), projector, steps=20)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert model.unused.grad is None


def test_with_all_curvature_kept_no_step_costs_anything_and_per_layer_it_closes_more(make_model):
    """Where all Δ_lᵀ C_ll Δ_l are zero, so is Δᵀ C Δ of a positive semi-definite C, also between layers."""
    model = make_model(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    risk = risk_of(model, draws(2, 6), nn.MSELoss(), draws(2, 4, seed=1))
    dense = estimate(GGN(), Dense(), risk).curvature.dense()
    used = {}
    for per in (WholeModel(), PerLayer()):
        space = ProtectedSpace().absorb(risk, Eigenspace(GGN(), Rank(8), per))
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), 0.1)
        projector = Projector(space, StepProjection())
        learn(own, optimizer, draws(9, 6, seed=3), projector, steps=1, targets=torch.arange(9) % 4)
        step = risk.space.vector(own) - risk.anchor
        assert step @ dense @ step < 1e-12 * (step @ step)
        used[per] = space.used
    assert used == {WholeModel(): 8, PerLayer(): 16}


# What moves and what does not


@pytest.mark.parametrize("protection", FAMILY)
def test_frozen_parameters_stay_and_the_others_are_projected_among_themselves(protection, protected):
    """U Δ = 0 with Δ zero where it is frozen, also when that changes within a task."""
    model, space = protected(FAMILY[protection])
    projector = Projector(space, StepProjection())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    new = draws(30, 8, seed=5)
    start = values_of(space, model)
    for frozen in (("0.weight", "2.bias"), (), ("0.bias",), ("0.weight", "0.bias")):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        before = values_of(space, model)
        learn(model, optimizer, new, projector, steps=10)
        after = values_of(space, model)
        optimizer.zero_grad(set_to_none=True)
        still = {name for name in after if torch.equal(after[name], before[name])}
        assert still >= {*frozen}
        assert still != {*after}
        assert space.leakage(after, before) < 1e-10
    assert space.leakage(after, start) < 1e-10


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("uncovered", [FreezeUncovered(), LeaveUncovered()])
def test_no_projection_moves_what_is_frozen(projection, uncovered, make_model):
    """Neither a covered parameter nor one that holds still, under weight decay."""
    model = make_model(lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)))
    space = ProtectedSpace().absorb(risk_of(model, draws(4, 8)), InputSpace(), uncovered=uncovered)
    for name in ("0.weight", "1.weight", "1.bias"):
        model.get_parameter(name).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS["momentum and weight decay"](model.parameters())
    learn(model, optimizer, draws(9, 8, seed=1), Projector(space, projection), steps=5)
    for name in ("0.weight", "1.weight", "1.bias"):
        assert torch.equal(model.get_parameter(name), before[name])
    assert not torch.equal(model[3].weight, before["3.weight"])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_parameters_without_a_gradient_are_moved_by_no_more_than_the_projection(projection, make_model):
    """A head that the task does not use has grad None: per layer, nothing touches it."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two, self.used = nn.Linear(8, 5), nn.Linear(5, 3), nn.Linear(5, 3), True

        def forward(self, x):
            hidden = torch.relu(self.body(x))
            return self.one(hidden) + self.two(hidden) if self.used else self.one(hidden)

    model = make_model(Heads)
    space = ProtectedSpace().absorb(risk_of(model, draws(4, 8)), Eigenspace(GGN(), Rank(4), PerLayer()))
    before, model.used = model.two.weight.detach().clone(), False
    learn(model, torch.optim.AdamW(model.parameters(), 1e-2), draws(9, 8, seed=1), Projector(space, projection), 5)
    assert model.two.weight.grad is None
    assert torch.equal(model.two.weight, before)


def test_projected_gradients_reach_parameters_that_have_none(protected):
    """g − UᵀU g is not zero where g is, for directions over all parameters; SGD stays exact."""
    model, space = protected(FAMILY["flat"])
    start = values_of(space, model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with Projector(space, GradientProjection()).around_step(model):
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert model[2].bias.grad.any()
    assert space.leakage(values_of(space, model), start) < 1e-12


@pytest.mark.parametrize("per", [WholeModel(), PerLayer()])
def test_what_a_task_needs_joins_at_the_place_of_its_own_parameters(per, make_model):
    """A first task with the first weight and the last bias frozen puts rows in that are zero there."""
    model, protection = make_model(mlp), Eigenspace(cut=Rank(3), per=per)
    parts = model[0].weight, model[2].bias
    for part in parts:
        part.requires_grad_(False)
    first = ProtectedSpace().absorb(risk_of(model, draws(20, 8)), protection)
    model.requires_grad_(True)
    risk = risk_of(model, draws(20, 8, seed=1))
    both, alone = first.absorb(risk, protection), ProtectedSpace().absorb(risk, protection)
    start = {name: torch.zeros_like(value) for name, value in both.values(model).items()}
    for block in (*first.blocks.values(), *alone.blocks.values()):
        for row in block.subspace.rows:
            step = {**start, **block.layout.parts(row[None])}
            assert both.leakage(step, start) == pytest.approx(1)
    assert both.used == first.used + alone.used


@pytest.mark.parametrize("protection", FAMILY)
def test_what_is_protected_stays_so_in_a_task_that_is_absorbed_while_it_is_frozen(protection, make_model):
    model, recipe = make_model(mlp), FAMILY[protection]
    first = ProtectedSpace().absorb(risk_of(model, draws(4, 8)), recipe)
    expected = first.absorb(risk_of(model, draws(4, 8, seed=1)), recipe)
    model[0].requires_grad_(False)
    found = first.absorb(risk_of(model, draws(4, 8, seed=1)), recipe)
    assert found.space == expected.space
    for key, block in expected.blocks.items():
        torch.testing.assert_close(found.blocks[key].subspace.rows, block.subspace.rows)
    assert found.frozen == ()


@pytest.mark.parametrize("protection", FAMILY)
def test_a_part_that_was_frozen_is_free_and_said_to_be_or_protected_where_it_is_included(protection, make_model):
    """A head warmed up on a frozen body, then everything."""
    model, inputs, recipe = make_model(mlp), draws(4, 8), FAMILY[protection]
    expected = ProtectedSpace().absorb(risk_of(model, inputs), recipe)
    model[0].requires_grad_(False)
    batches = [(inputs, torch.arange(4) % 3)]
    included = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches, include=["*"])
    whole, head = (ProtectedSpace().absorb(risk, recipe) for risk in (included, risk_of(model, inputs)))
    assert head.unprotected(model) == ()
    model[0].requires_grad_(True)
    assert (whole.unprotected(model), head.unprotected(model)) == ((), ("0.weight", "0.bias"))
    for key, block in expected.blocks.items():
        torch.testing.assert_close(whole.blocks[key].subspace.rows, block.subspace.rows)
    projector, optimizer = Projector(head, StepProjection()), torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias\. Absorb the past with include=") as caught:
        learn(model, optimizer, inputs, projector, steps=2)
    assert [warning.filename for warning in caught] == [__file__]


def test_steps_of_a_model_without_what_is_protected_are_refused(make_model):
    """Whatever they do, they would leave out what the past needs."""
    model, inputs = make_model(mlp), draws(4, 8)
    projector = Projector(ProtectedSpace().absorb(risk_of(model, inputs), InputSpace()), StepProjection())
    other = nn.Linear(8, 3).to(model[0].weight)
    with pytest.raises(ValueError, match=r"'2.weight' of the anchored model is not in the model any more"):
        learn(other, torch.optim.SGD(other.parameters(), 0.1), inputs, projector, steps=1)


def grown(model):
    """The same with one more input and two more outputs of the last layer, and one more input of the first."""
    larger = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 5)).to(model[0].weight)
    with torch.no_grad():
        for old, new in zip(model.parameters(), larger.parameters()):
            new.zero_()
            new[tuple(slice(n) for n in old.shape)] = old
    return larger


@pytest.mark.parametrize("protection", FAMILY)
def test_grown_parameters_are_free_and_the_old_part_is_protected(protection, protected):
    model, space = protected(FAMILY[protection])
    larger, plain = grown(model), grown(model)
    start = values_of(space, larger)
    new, targets = draws(30, 9, seed=5), torch.arange(30) % 5
    for one, projector in ((larger, Projector(space, StepProjection())), (plain, None)):
        learn(one, torch.optim.SGD(one.parameters(), 0.1), new, projector, steps=1, targets=targets)
    assert torch.equal(larger[0].weight[:, 8:], plain[0].weight[:, 8:])
    assert torch.equal(larger[2].weight[3:], plain[2].weight[3:])
    assert torch.equal(larger[2].bias[3:], plain[2].bias[3:])
    assert not torch.allclose(larger[0].weight[:, :8], plain[0].weight[:, :8])
    assert space.leakage(values_of(space, larger), start) < 1e-10
    both = space.absorb(risk_of(larger, new, targets=targets), FAMILY[protection])
    start = values_of(both, larger)
    projector = Projector(both, StepProjection())
    learn(larger, torch.optim.Adam(larger.parameters()), draws(30, 9, seed=6), projector, steps=10)
    assert both.leakage(values_of(both, larger), start) < 1e-10
    old = values_of(space, larger)
    assert space.leakage(old, {n: start[n][tuple(slice(k) for k in p.shape)] for n, p in old.items()}) < 1e-6


def test_half_precision_models_train_on(protected):
    """Bases are in float32; steps come as near to the complement as eight bits let them."""
    for protection in FAMILY.values():
        model, space = protected(protection, torch.bfloat16)
        assert all(block.subspace.rows.dtype == torch.float32 for block in space.blocks.values())
        start = values_of(space, model)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for projection in (StepProjection(), GradientProjection()):
            learn(model, optimizer, draws(20, 8, seed=1, kind=torch.bfloat16), Projector(space, projection), steps=20)
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        assert space.leakage(values_of(space, model), start) < 0.1


def test_names_that_wrappers_change_are_found(protected):
    model, space = protected(FAMILY["flat"])
    start = values_of(space, model)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        projector = Projector(space, StepProjection())
        learn(wrapped, torch.optim.Adam(model.parameters()), draws(20, 8, seed=1), projector, steps=5)
    assert space.leakage(values_of(space, model), start) < 1e-10
    assert not torch.equal(start["0.weight"], model[0].weight)


def test_memory_is_stated_and_checked_before_it_is_taken(make_model):
    """P = 8·16 + 16 + 16·3 + 3 = 195 float64 numbers for each direction."""
    model = make_model(mlp)
    risk = risk_of(model, draws(20, 8))
    protection = Eigenspace(cut=Rank(10))
    space = ProtectedSpace().absorb(risk, protection)
    own = space.blocks[""].subspace
    assert own.rows.nbytes == 10 * 195 * 8
    assert space.nbytes == own.rows.nbytes + (10 * 10 + 10) * 8
    needed = 20 * 195 * 8 + 2 * (10 * 20 + 10) * 8  # two tasks of 10 directions, in a basis of 20
    options = {"max_rank": None, "max_bytes": needed}
    ProtectedSpace().check(protection, risk.space, 8, **options)
    space.check(protection, risk.space, 8, **options)
    assert space.absorb(risk_of(model, draws(20, 8, seed=1)), protection).nbytes == needed
    with pytest.raises(MemoryError, match=r"may need 33.8 KiB, over .* 33.7 KiB; they hold 16.1 KiB now.*max_rank"):
        space.check(protection, risk.space, 8, max_rank=None, max_bytes=needed - 1 - 20)
    space.check(protection, risk.space, 8, max_rank=12, max_bytes=needed)
    inputs = InputSpace(Rank(5))
    with pytest.raises(MemoryError, match=r"may need 1.5 KiB, over .* 1000.0 B"):  # 5 · (9 + 17 + 12) numbers
        ProtectedSpace().check(inputs, risk.space, 8, max_rank=None, max_bytes=1000)
    ProtectedSpace().check(inputs, risk.space, 8, max_rank=None, max_bytes=5 * 38 * 8)


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"cut": Rank}, TypeError, r"Did you mean Rank\(20\)"),
        ({"cut": 20}, TypeError, r"got 20. Give a value such as Rank\(20\)"),
        ({"curvature": Fisher}, TypeError, r"curvature must be a Curvature.*Did you mean Fisher\(\)"),
        ({"per": "layer"}, TypeError, r"got 'layer'.*PerLayer\(\)"),
        ({"examples": 0}, ValueError, "at least 1; got 0"),
        ({"seed": None}, ValueError, "seed"),
        ({"curvature": Hessian(), "cut": Energy(0.9)}, TypeError, "trace|Energy"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, error, remedy):
    with pytest.raises(error, match=remedy):
        Eigenspace(**options)


def test_rows_are_zero_in_columns_that_have_grown():
    """A weight [2, 2] in one of [2, 3]: the row (a, b, c, d) becomes (a, b, 0, c, d, 0)."""
    small, large = (Layout(ParameterSpace(("w",), (torch.Size(shape),))) for shape in ((2, 2), (2, 3)))
    rows = torch.arange(1.0, 9.0).view(2, 4)
    expected = torch.tensor([[1.0, 2.0, 0.0, 3.0, 4.0, 0.0], [5.0, 6.0, 0.0, 7.0, 8.0, 0.0]])
    assert torch.equal(small.widened(rows, large), expected)
    assert small.widened(rows, small) is rows


def test_parameters_and_norm_layers_of_other_tasks_are_not_held():
    """Of raw parameters and norm layers by task, only those of the task that was learned."""

    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
            self.heads = nn.ParameterList([torch.ones(3, 4), torch.ones(3, 4)])
            self.task = 0

        def forward(self, x):
            return self.norms[self.task](x) @ self.heads[self.task].T

    space = ProtectedSpace().absorb(risk_of(Tasks().double(), draws(20, 4)), InputSpace())
    assert space.statistics == ("norms.0",)
    assert {*space.held.names} == {"norms.0.weight", "norms.0.bias", "heads.0"}


def test_directions_of_another_recipe_are_refused(make_model):
    risk = risk_of(make_model(mlp), draws(20, 8))
    flat = ProtectedSpace().absorb(risk, FAMILY["flat"])
    for other in ("per layer", "inputs"):
        with pytest.raises(ValueError, match="Protect all tasks in the same way"):
            flat.absorb(risk, FAMILY[other])
    with pytest.raises(ValueError, match="max_rank must be an integer of at least 1; got 0"):
        flat.absorb(risk, FAMILY["flat"], max_rank=0)
    with pytest.raises(TypeError, match=r"projection must be a Projection.*Did you mean StepProjection\(\)"):
        Projector(flat, StepProjection)


def test_a_step_that_raises_is_taken_out_as_far_as_it_came(protected):
    model, space = protected(FAMILY["flat"])
    start, projector = values_of(space, model), Projector(space, StepProjection())

    def half_way():
        with torch.no_grad():
            model[0].weight += 1
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), projector.around_step(model):
        half_way()
    assert space.leakage(values_of(space, model), start) < 1e-12
    with pytest.raises(RuntimeError, match="around_step"):
        projector.after_step(model)
