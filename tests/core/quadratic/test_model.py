from functools import reduce
from operator import add

import pytest
import torch
from torch import Size, nn

from avalanche_curv import (
    EKFAC,
    GGN,
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Fisher,
    FrobeniusOptimal,
    KeepTerms,
    Kronecker,
    LowRank,
    ParameterSpace,
    PartialTraces,
    PiWeighted,
    QuadraticModel,
    Rank,
    estimate,
)
from avalanche_curv.core.structures.diagonal import DiagonalMatrix


class Slots(nn.Module):
    """Parameters by name, for models that grow, lose and gain some."""

    def __init__(self, seed=0, **shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))


OLD = {"weight": (2, 3), "bias": (2,), "scale": ()}
SUCCESSORS = {
    "the same": OLD,
    "appended rows": {"weight": (4, 3), "bias": (4,), "scale": ()},
    "a new name": {"weight": (2, 3), "bias": (2,), "scale": (), "head": (3,)},
    "new names first": {"head": (3,), "weight": (2, 3), "bias": (2,), "scale": ()},
    "another order": {"scale": (), "bias": (2,), "weight": (2, 3)},
    "all at once": {"head": (3,), "bias": (3,), "weight": (3, 3), "scale": ()},
}


def by_hand(past, model):
    """c + gᵀδ + ½ δᵀCδ at the parameters of a model that holds the coordinates of the quadratic."""
    delta = past.space.vector(model) - past.anchor
    slope = 0 if past.gradient is None else past.gradient @ delta
    return past.constant + slope + 0.5 * delta @ past.curvature.dense() @ delta


def gradients_by_hand(pasts, model):
    """Σ ∇q by autograd through the entries."""
    total = sum(
        past.constant
        + (0 if past.gradient is None else past.gradient @ delta)
        + 0.5 * delta @ past.curvature.dense() @ delta
        for past in pasts
        for delta in [torch.cat([t.reshape(-1) for t in past.space.tensors(model)]) - past.anchor]
    )
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)


@pytest.fixture
def old_space():
    return ParameterSpace.of(Slots(**OLD))


def test_value_increase_and_gradient_on_paper():
    space = ParameterSpace(("w",), (Size((2,)),))
    past = QuadraticModel(
        space, torch.tensor([1.0, -1.0]), DiagonalMatrix(torch.tensor([2.0, 4.0])), torch.tensor([1.0, 3.0]), 10.0
    )
    delta = torch.tensor([3.0, 1.0])  # g δ = 6, ½ (2 · 9 + 4 · 1) = 11
    assert past.increase(delta).item() == 17
    assert past.gradient_at(delta).tolist() == [7.0, 7.0]
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([4.0, 0.0]))})
    assert past.displacement(model).tolist() == delta.tolist()
    assert past(model).item() == past.penalty(model).item() == 27


def test_penalty_has_the_value_and_exactly_the_gradient_of_the_quadratic(random_quadratic, old_space, close):
    past, model = random_quadratic(old_space, 1), Slots(seed=5, **OLD)
    penalty = past.penalty(model)
    assert penalty.ndim == 0
    close(penalty.detach(), by_hand(past, model))
    found = torch.autograd.grad(penalty, list(model.parameters()))
    delta = past.displacement(model)
    close(torch.cat([g.reshape(-1) for g in found]), past.gradient + past.curvature.dense() @ delta)
    close(past.gradient_at(delta), past.gradient + past.curvature.dense() @ delta)


def test_gradcheck_of_the_penalty_times_a_strength(random_quadratic, old_space):
    past, model = random_quadratic(old_space, 1), Slots(seed=5, **OLD)
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def loss(*parameters):
        for name, value in zip(names, parameters):
            model._parameters[name] = value
        return 3.7 * past.penalty(model) + sum(p.square().sum() for p in parameters)

    assert torch.autograd.gradcheck(loss, values)


def test_the_penalty_leaves_parameters_and_model_as_they_were(random_quadratic, old_space):
    past, model = random_quadratic(old_space, 1), Slots(seed=5, **OLD)
    before, anchor, slope = past.space.vector(model), past.anchor.clone(), past.gradient.clone()
    past.penalty(model).backward()
    past(model), past.reanchored(before), past + past
    assert torch.equal(past.space.vector(model), before)
    assert torch.equal(past.anchor, anchor)
    assert torch.equal(past.gradient, slope)


def test_the_penalty_of_a_single_parameter_does_not_write_into_it(make_model):
    layer = make_model(lambda: nn.Linear(2, 1, bias=False))
    before = layer.weight.detach().clone()
    past = QuadraticModel(ParameterSpace.of(layer), torch.ones(2).double(), DiagonalMatrix(torch.ones(2).double()))
    past.penalty(layer).backward()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
def test_lower_precision_parameters_get_gradients_of_their_own_type(dtype, tolerance, random_quadratic, old_space):
    past, exact = random_quadratic(old_space, 1), Slots(seed=5, **OLD)
    exact.to(dtype)
    rounded = Slots(**OLD)
    rounded.load_state_dict({name: value.double() for name, value in exact.state_dict().items()})
    penalty = past.penalty(exact)
    found = torch.autograd.grad(penalty, list(exact.parameters()))
    assert {g.dtype for g in found} == {dtype}
    torch.testing.assert_close(penalty.double(), past.penalty(rounded), rtol=1e-6, atol=1e-6)
    for a, b in zip(found, torch.autograd.grad(past.penalty(rounded), list(rounded.parameters()))):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_is_anchored_in_single_precision(dtype, net):
    net.to(dtype)
    batch = (torch.ones(2, 4, dtype=dtype), torch.tensor([0, 1]))
    past = estimate(GGN(), Diagonal(), EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [batch]))
    assert past.anchor.dtype == torch.float32
    assert past.penalty(net).item() == 0
    past.penalty(net).backward()
    assert {p.grad.dtype for p in net.parameters()} == {dtype}


def test_new_coordinates_get_no_gradient(random_quadratic, old_space):
    past, grown = random_quadratic(old_space, 1), Slots(seed=5, **SUCCESSORS["all at once"])
    past.penalty(grown).backward()
    assert grown.head.grad is None
    assert grown.weight.grad[2:].abs().sum() == grown.bias.grad[2:].abs().sum() == 0
    assert grown.weight.grad[:2].abs().min() > 0


def test_re_anchoring_leaves_the_function_unchanged(random_quadratic, old_space, close):
    past = random_quadratic(old_space, 1)
    for moved in (past.reanchored(torch.ones_like(past.anchor)), past.reanchored(past.anchor)):
        for seed in range(3):
            model = Slots(seed=seed, **OLD)
            close(moved(model), by_hand(past, model))
            close(moved.gradient_at(moved.displacement(model)), past.gradient_at(past.displacement(model)))


def test_re_anchoring_a_pure_quadratic_on_paper():
    space = ParameterSpace(("w",), (Size((1,)),))
    past = QuadraticModel(space, torch.tensor([1.0]), DiagonalMatrix(torch.tensor([4.0])))  # 2 (w − 1)²
    moved = past.reanchored(torch.tensor([3.0]))  # 8 + 8 (w − 3) + 2 (w − 3)²
    assert (moved.constant, moved.gradient.item(), moved.curvature.values.item()) == (8.0, 8.0, 4.0)


@pytest.mark.parametrize("successor", SUCCESSORS)
def test_a_sum_is_the_sum_of_both_functions(successor, random_quadratic, old_space, close):
    newest = Slots(seed=9, **SUCCESSORS[successor])
    old, new = random_quadratic(old_space, 1), random_quadratic(ParameterSpace.of(newest), 2)
    both = old + new
    for seed in range(3):
        model = Slots(seed=seed, **SUCCESSORS[successor])
        close(both(model), by_hand(old, model) + by_hand(new, model))
        found = torch.autograd.grad(both.penalty(model), list(model.parameters()))
        for a, b in zip(found, gradients_by_hand([old, new], model), strict=True):
            close(a, b)


@pytest.mark.parametrize("successor", SUCCESSORS)
def test_a_sum_is_anchored_where_the_newer_is_and_its_increase_counts_from_there(
    successor, random_quadratic, old_space, close
):
    newest = Slots(seed=9, **SUCCESSORS[successor])
    space = ParameterSpace.of(newest)
    old, new = random_quadratic(old_space, 1), random_quadratic(space, 2)
    both = old + new
    assert both.space == space
    assert torch.equal(both.anchor, new.anchor)
    delta = torch.randn(space.size, generator=torch.Generator().manual_seed(0)).double()
    model = Slots(**SUCCESSORS[successor])
    nn.utils.vector_to_parameters(new.anchor + delta, model.parameters())
    close(both.increase(delta), both(model) - both.constant)


def test_a_parameter_that_the_newer_lacks_keeps_its_anchor(random_quadratic, close):
    all_names, fewer = {"head": (2,), "weight": (2, 3)}, {"weight": (3, 3)}
    old = random_quadratic(ParameterSpace.of(Slots(**all_names)), 1)
    new = random_quadratic(ParameterSpace.of(Slots(**fewer)), 2)
    both, model = old + new, Slots(seed=3, head=(2,), weight=(3, 3))
    close(both(model), by_hand(old, model) + by_hand(new, model))
    assert both.space == ParameterSpace(("weight", "head"), (Size((3, 3)), Size((2,))))
    assert torch.equal(both.anchor, torch.cat([new.anchor, old.anchor[:2]]))


def test_many_models_with_a_growing_head_fold_into_their_sum(random_quadratic, close):
    grown = [{"body": (2, 2), "head": (rows, 2)} for rows in (1, 2, 2, 4)]
    pasts = [random_quadratic(ParameterSpace.of(Slots(**shapes)), seed) for seed, shapes in enumerate(grown)]
    folded = ((pasts[0] + pasts[1]) + pasts[2]) + pasts[3]
    model = Slots(seed=7, **grown[-1])
    close(folded(model), sum(by_hand(past, model) for past in pasts))
    found = torch.autograd.grad(folded.penalty(model), list(model.parameters()))
    for a, b in zip(found, gradients_by_hand(pasts, model), strict=True):
        close(a, b)


def test_pure_quadratics_at_one_anchor_sum_without_a_gradient(old_space):
    anchor, values = torch.ones(old_space.size), torch.arange(1.0, old_space.size + 1)
    past = QuadraticModel(old_space, anchor, DiagonalMatrix(values))
    both = past + past
    assert both.gradient is None
    assert both.constant == 0
    assert torch.equal(both.curvature.values, 2 * values)


@pytest.mark.parametrize("successor", SUCCESSORS)
def test_an_embedded_model_is_the_same_function(successor, random_quadratic, old_space, close):
    past, model = random_quadratic(old_space, 1), Slots(seed=4, **SUCCESSORS[successor])
    embedded = past.embedded(ParameterSpace.of(model))
    assert embedded.space == ParameterSpace.of(model)
    close(embedded(model), by_hand(past, model))


def test_memory_does_not_grow_with_the_number_of_summands(random_quadratic, old_space):
    total, sizes = random_quadratic(old_space, 0), set()
    for seed in range(1, 8):
        total = total + random_quadratic(old_space, seed)
        sizes.add(total.nbytes)
    assert sizes == {random_quadratic(old_space, 0).nbytes}


def test_memory_is_that_of_anchor_curvature_and_gradient(old_space, random_quadratic):
    past = random_quadratic(old_space, 0)
    assert past.nbytes == 2 * 8 * old_space.size + past.curvature.nbytes
    assert QuadraticModel(past.space, past.anchor, past.curvature).nbytes == 8 * old_space.size + past.curvature.nbytes


@pytest.mark.parametrize("structure", [Dense(), Diagonal(), BlockDiagonal()])
def test_minimising_the_quadratic_of_a_linear_regression_finds_its_minimum(structure, new_problem, make_model, close):
    """One Newton step on q, which is the loss itself for Dense; a descent for the others."""
    known = new_problem(make_model(lambda: nn.Linear(4, 1)), "mean_square")
    past = estimate(GGN(), structure, known.risk, gradient=True)
    step = torch.linalg.solve(past.curvature.dense(), past.gradient)
    assert past.increase(-step) < 0
    nn.utils.vector_to_parameters(past.anchor - step, known.model.parameters())
    if structure == Dense():
        close(known.paper.gradients_at(past.anchor - step).mean(0), torch.zeros(5).double())


def test_a_model_that_lost_a_parameter_is_refused(random_quadratic, old_space):
    past = random_quadratic(old_space, 0)
    with pytest.raises(ValueError, match=r"'scale'.*not in the model any more"):
        past.penalty(Slots(weight=(2, 3), bias=(2,)))
    with pytest.raises(ValueError, match="'bias' had shape"):
        past(Slots(weight=(2, 3), bias=(1,), scale=()))


def on_a_line(weight: list[float], x: list[float]) -> EmpiricalRisk:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weight]))
    return EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.tensor([x]).double(), torch.zeros(1, 1).double())])


def test_a_sum_that_is_cut_keeps_its_minimum_and_stays_bounded_below() -> None:
    """w₁² + (2 w₂)²: of the curvatures 2 and 8 the larger is kept, and no slope of the other."""
    structure = LowRank(Rank(1), max_rank=1)
    places = ([0.0, 0.0], [1.0, 0.0]), ([5.0, 0.0], [0.0, 2.0])
    one, two = (estimate(GGN(), structure, on_a_line(*place)) for place in places)
    total = one + two
    model = nn.Linear(2, 1, bias=False).double()
    for w1, w2 in ((0.0, 0.0), (-5.0, 0.0), (-100.0, 3.0)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[w1, w2]]))
        assert float(total(model)) == pytest.approx(4 * w2**2)


def moved(structure, seed, dtype=torch.float64):
    """Quadratic models of five experiences, and the model far from them."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, found = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype), []
    for _ in range(5):
        x, y = torch.randn(20, 4, generator=generator).to(dtype), torch.randint(3, (20,), generator=generator)
        found.append(estimate(Fisher(), structure, EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found, model, generator


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", [LowRank(Rank(2), max_rank=4), Kronecker(FrobeniusOptimal())], ids=str)
def test_bounded_sums_of_many_experiences_are_never_negative(structure, dtype, seed) -> None:
    parts, model, generator = moved(structure, seed, dtype)
    total = reduce(add, parts)
    for _ in range(50):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
        assert float(total(model)) > -1e-5


@pytest.mark.parametrize(
    "structure",
    [Kronecker(PiWeighted()), Kronecker(PartialTraces()), Kronecker(KeepTerms(most=2)), EKFAC(PiWeighted())],
    ids=str,
)
def test_one_pair_keeps_the_slope_at_the_newest_anchor_and_a_minimum(structure, close) -> None:
    """Of the sum that it takes in; for pi-weighted factors the minimum lies below q there by 1 / c as much, at most."""
    parts, *_ = moved(structure, seed=0)
    held = parts[0]
    for new in parts[1:]:
        slope, value = held.gradient_at(new.anchor - held.anchor), held.increase(new.anchor - held.anchor)
        exact = held.curvature.dense() + new.curvature.dense()
        total, before = held + new, held.constant + value
        close(total.gradient, slope)
        assert total.constant == pytest.approx(float(before))
        kept = total.curvature.dense()
        steps = [-torch.linalg.pinv(curvature, hermitian=True) @ slope for curvature in (exact, kept)]
        close(kept @ steps[1], -slope)  # which has a minimum
        if structure == Kronecker(PiWeighted()):
            assert slope @ steps[1] >= 2 * slope @ steps[0]
        held = total


