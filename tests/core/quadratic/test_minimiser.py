"""Where a quadratic model is least, against its entries solved by elimination; and models that were trained apart."""

from functools import partial, reduce
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
    Hessian,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    ParameterSpace,
    PerLayer,
    QuadraticModel,
    Rank,
    StepBound,
    Tikhonov,
    estimate,
    merged_parameters,
)
from avalanche_curv.core.structures.dense import DenseMatrix
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.low_rank import LowRankMatrix

STRUCTURES = [
    Dense(), Diagonal(), BlockDiagonal(), BlockDiagonal(PerLayer(), LowRank(Rank(4))), LowRank(Rank(6)),
    LowRank(Rank(6), Diagonal()), Kronecker(KeepTerms()), EKFAC(KeepTerms()), MatrixFree(),
]  # fmt: skip
exactly = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


def network(seed, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def risk_of(model, seed, examples=20):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(examples, 4, generator=generator), torch.randint(3, (examples,), generator=generator)
    return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x.to(model[0].weight), y)])


def several(structure, count=3, dtype=torch.float64, gradient=False):
    """Quadratic models of networks apart, each of its own examples."""
    return [estimate(Fisher(), structure, risk_of(network(s, dtype), s), gradient=gradient) for s in range(count)]


def vector_of(named):
    return torch.cat([part.reshape(-1) for part in named.values()])


def nearest(matrix, slope):
    """The shortest solution of C δ = −g, from the entries."""
    return -torch.linalg.pinv(matrix, hermitian=True, rtol=1e-11) @ slope


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_damped_minimum_solves_the_entries(structure):
    past = several(structure, 1, gradient=True)[0]
    found = past.minimiser(0.1, tolerance=1e-12)
    whole = past.curvature.dense() + 0.1 * torch.eye(past.space.size, dtype=torch.float64)
    exactly(vector_of(found), past.anchor - torch.linalg.solve(whole, past.gradient))
    exactly(found, past.minimiser(Tikhonov(0.1), tolerance=1e-12))
    assert {name: part.shape for name, part in found.items()} == dict(zip(past.space.names, past.space.shapes))


@pytest.mark.parametrize(
    "structure", [LowRank(Rank(6)), BlockDiagonal(), Kronecker(KeepTerms()), EKFAC(KeepTerms())], ids=str
)
def test_little_damping_loses_no_digits(structure):
    """(C + τI)⁻¹ is made of f(C) + I / τ, whose terms cancel up to 1e-9 here."""
    past = several(structure, 1, gradient=True)[0]
    step = vector_of(past.minimiser(1e-9, tolerance=1e-8)) - past.anchor
    left = past.curvature.dense() @ step + 1e-9 * step + past.gradient
    assert float(left.norm()) <= 1e-8 * float(past.gradient.norm())


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_minimum_of_a_sum_at_several_anchors_is_the_one_nearest_to_its_anchor(structure):
    """20 examples of 2 free outputs leave 3 parameters of 43 flat; and each structure its own ones."""
    parts = several(structure)
    total = reduce(add, parts)
    whole = sum(part.curvature.dense() for part in parts)
    slope = sum(part.curvature.dense() @ (total.anchor - part.anchor) for part in parts)
    found = vector_of(total.minimiser(tolerance=1e-11))
    torch.testing.assert_close(found, total.anchor + nearest(whole, slope), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole @ (found - total.anchor), -slope, rtol=0, atol=1e-9)


def test_without_a_slope_the_anchor_is_the_minimum():
    past = several(Dense(), 1)[0]
    exactly(vector_of(past.minimiser()), past.anchor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_regression_is_solved_from_anywhere_and_loads_in_one_line(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator).to(dtype), torch.randn(30, 2, generator=generator).to(dtype)
    model = nn.Linear(4, 2).to(dtype)
    past = estimate(GGN(), Dense(), EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, y)]), gradient=True)
    model.load_state_dict(past.minimiser(), strict=False)
    inputs = torch.cat([x, torch.ones(30, 1)], dim=1)
    best = torch.linalg.lstsq(inputs, y).solution.T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), best, rtol=0, atol=tolerance)


ON_A_PLANE = ParameterSpace(("w",), (Size((2,)),))


def flat_along_the_second(kind):
    values = torch.tensor([4.0, 0.0]).double()
    return {
        "dense": lambda: DenseMatrix(values.diag()),
        "diagonal": lambda: DiagonalMatrix(values),
        "low rank": lambda: LowRankMatrix(torch.eye(2).double()[:1], values[:1]),
        "low rank and diagonal": lambda: LowRankMatrix(torch.eye(2).double()[:1], values[:1] / 2, values / 2),
    }[kind]()


@pytest.mark.parametrize("kind", ["dense", "diagonal", "low rank", "low rank and diagonal"])
def test_a_slope_out_of_the_range_has_no_minimum_without_damping(kind):
    matrix, anchor = flat_along_the_second(kind), torch.ones(2).double()
    inside = QuadraticModel(ON_A_PLANE, anchor, matrix, torch.tensor([2.0, 0.0]).double())
    exactly(inside.minimiser()["w"], torch.tensor([0.5, 1.0]).double())
    outside = QuadraticModel(ON_A_PLANE, anchor, matrix, torch.tensor([2.0, 1.0]).double())
    with pytest.raises(ValueError, match=r"length 2\.24, leaves the range of C by 1.*no minimum.*damping=StepBound"):
        outside.minimiser()
    exactly(outside.minimiser(0.5)["w"], anchor - torch.tensor([4.0, 2.0]).double() / torch.tensor([9.0, 1.0]).double())
    far = outside.minimiser(StepBound(3.0))["w"] - anchor
    assert float(far.norm()) <= 3 * float(anchor.norm())


@pytest.mark.parametrize("matrix", [
    DenseMatrix(torch.tensor([1.0, -0.5]).double().diag()),
    LowRankMatrix(torch.eye(2).double()[:1], torch.tensor([1.5]).double(), torch.tensor([-0.5, -0.5]).double()),
], ids=["by eigenvalues", "by products"])  # fmt: skip
def test_negative_curvature_has_no_minimum_unless_it_is_damped(matrix):
    past = QuadraticModel(ON_A_PLANE, torch.zeros(2).double(), matrix, torch.tensor([0.1, 1.0]).double())
    with pytest.raises(ValueError, match=r"negative curvature -0\.\d+, along which.*Hessian\(psd=Clip\(\)\).*damping"):
        past.minimiser()
    exactly(past.minimiser(1.0)["w"], -past.gradient / torch.tensor([2.0, 0.5]).double())


def test_products_that_do_not_suffice_are_an_error_with_what_is_left_and_what_to_do():
    total = reduce(add, several(Kronecker(KeepTerms())))
    with pytest.raises(RuntimeError, match=r"After 3 products .* of ‖g‖, and .* 1e-06.*damping.*max_products"):
        total.minimiser(max_products=3)


def test_single_precision_is_solved_in_double_and_returned_in_single():
    total = reduce(add, several(Kronecker(KeepTerms()), dtype=torch.float32))
    found = total.minimiser(0.1)
    assert {part.dtype for part in found.values()} == {torch.float32}
    whole = total.curvature.dense().double() + 0.1 * torch.eye(total.space.size)
    solved = total.anchor.double() - torch.linalg.solve(whole, total.gradient.double())
    torch.testing.assert_close(vector_of(found).double(), solved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda q: q.minimiser(-1.0), "damping must be a finite number, at least 0; got -1.0. It is in units of curv"),
        (lambda q: q.minimiser(tolerance=0), "tolerance must be a finite number, above 0"),
        (lambda q: q.minimiser(max_products=0), "max_products must be an integer of at least 1"),
        (lambda q: merged_parameters([]), "nothing to merge: give a quadratic model of each"),
        (lambda q: merged_parameters([q, q], [1.0]), "one number for each of the 2 models; got 1"),
        (lambda q: merged_parameters([q, q], [1.0, 0.0]), "weights must be a finite number, above 0; got 0.0"),
        (lambda q: merged_parameters([q, q], damping=-1.0), "damping must be"),
    ],
)
def test_bad_numbers_are_refused(call, what):
    with pytest.raises(ValueError, match=what):
        call(several(Diagonal(), 1)[0])


def test_only_quadratic_models_of_one_structure_are_merged():
    with pytest.raises(TypeError, match=r"models must be a QuadraticModel; got .*estimate\(Fisher"):
        merged_parameters([nn.Linear(1, 1)])
    with pytest.raises(TypeError, match="can be added to"):
        merged_parameters([*several(Diagonal(), 1), *several(Kronecker(), 1)])
    wide, narrow = (
        QuadraticModel(ParameterSpace(("w",), (torch.Size((2, n // 2)),)), torch.ones(n), DiagonalMatrix(torch.ones(n)))
        for n in (6, 4)
    )
    with pytest.raises(ValueError, match=r"'w' has shapes \[2, 3\] and \[2, 2\]"):
        merged_parameters([wide, narrow])
    indefinite = [estimate(Hessian(), Dense(), risk_of(network(s), s)) for s in range(2)]
    with pytest.raises(ValueError, match="negative curvature"):
        merged_parameters(indefinite)


@pytest.mark.parametrize(("weights", "damping"), [(None, 0.0), ((3.0, 1.0, 0.5), 0.05)])
@pytest.mark.parametrize("structure", [*STRUCTURES[:-1], Kronecker()], ids=str)
def test_merged_parameters_minimise_the_sum_written_out(structure, damping, weights):
    """Also of structures whose own sums are no sums: their terms are kept."""
    models, before = several(structure), several(structure)
    found = vector_of(merged_parameters(models, weights, damping=damping, tolerance=1e-12))
    shares = weights or (1.0, 1.0, 1.0)
    average = sum(w * m.anchor for w, m in zip(shares, models)) / sum(shares)
    matrices = [w * m.damped(damping).curvature.dense() for w, m in zip(shares, models)]
    slope = sum(c @ (average - m.anchor) for c, m in zip(matrices, models))
    torch.testing.assert_close(found, average + nearest(sum(matrices), slope), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a.anchor, b.anchor) for a, b in zip(models, before))
    backwards = merged_parameters(models[::-1], weights and weights[::-1], damping=damping, tolerance=1e-12)
    torch.testing.assert_close(vector_of(backwards), found, rtol=1e-6, atol=1e-7)


def test_diagonals_merge_as_matena_and_raffel_do():
    models, weights = several(Diagonal()), (2.0, 1.0, 3.0)
    fishers = [w * m.curvature.values for w, m in zip(weights, models)]
    expected = sum(f * m.anchor for f, m in zip(fishers, models)) / sum(fishers)
    exactly(vector_of(merged_parameters(models, weights)), expected)
    floored = [
        QuadraticModel(m.space, m.anchor, m.curvature.map_spectrum(lambda f: f.clamp(min=1e-2))) for m in models
    ]  # fmt: skip
    fishers = [w * m.curvature.values.clamp(min=1e-2) for w, m in zip(weights, models)]
    expected = sum(f * m.anchor for f, m in zip(fishers, models)) / sum(fishers)
    exactly(vector_of(merged_parameters(floored, weights)), expected)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_equal_curvatures_merge_to_the_weighted_average(structure):
    one = several(structure, 1)[0]
    anchors = [one.anchor, 2 * one.anchor + 1, -one.anchor]
    models = [QuadraticModel(one.space, anchor, one.curvature) for anchor in anchors]
    found = vector_of(merged_parameters(models, (1.0, 2.0, 5.0)))
    exactly(found, (anchors[0] + 2 * anchors[1] + 5 * anchors[2]) / 8)


def test_much_damping_merges_to_the_average():
    models = several(Kronecker())
    average = sum(m.anchor for m in models) / 3
    torch.testing.assert_close(vector_of(merged_parameters(models, damping=1e7)), average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("structure", [Dense(), BlockDiagonal(PerLayer()), Kronecker(), EKFAC(), MatrixFree()], ids=str)
def test_linear_heads_of_parts_merge_to_the_least_squares_solution_of_all(structure):
    """Each head is least squares on its own part; the curvature of several outputs is A ⊗ I, a Kronecker product."""
    generator, heads, counts = torch.Generator().manual_seed(0), [], (12, 40, 25)
    x = [torch.randn(n, 6, generator=generator).double() + k for k, n in enumerate(counts)]
    y = [torch.randn(n, 3, generator=generator).double() for n in counts]

    def solved(x, y):
        return torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], dim=1), y).solution.T

    def head(x, y):
        model, best = nn.Linear(6, 3).double(), solved(x, y)
        model.load_state_dict({"weight": best[:, :6], "bias": best[:, 6]})
        return estimate(GGN(), structure, EmpiricalRisk.snapshot(model, nn.MSELoss(), [(x, y)]))

    heads = [head(*part) for part in zip(x, y)]
    found = merged_parameters(heads, counts, tolerance=1e-12)
    best = solved(torch.cat(x), torch.cat(y))
    torch.testing.assert_close(torch.cat([found["weight"], found["bias"][:, None]], 1), best, rtol=0, atol=1e-8)


def test_what_only_some_models_have_is_merged_over_these():
    """Two bodies with a head each, and a third model that shares the head of the second."""
    body, a, b = Size((2,)), Size((1,)), Size((3,))
    spaces = [ParameterSpace(("body", "a"), (body, a)), *2 * [ParameterSpace(("b", "body"), (b, body))]]
    generator = torch.Generator().manual_seed(0)

    def made(space):
        values = torch.rand(space.size, generator=generator).double() + 0.1
        return QuadraticModel(space, torch.randn(space.size, generator=generator).double(), DiagonalMatrix(values))

    models = [made(space) for space in spaces]
    found, damped = merged_parameters(models), merged_parameters(models, damping=0.3)
    anchors = [dict(zip(m.space.names, m.space.split(m.anchor))) for m in models]
    curvatures = [dict(zip(m.space.names, m.space.split(m.curvature.values))) for m in models]
    for tau, merged in ((0.0, found), (0.3, damped)):
        for name in ("body", "a", "b"):
            held = [(c[name] + tau, w[name]) for c, w in zip(curvatures, anchors) if name in c]
            exactly(merged[name], sum(c * w for c, w in held) / sum(c for c, _ in held))


def test_merging_sees_no_slope_where_all_networks_are_flat():
    """No anchor leaves the curved direction: what is left is rounding, and the flat one is averaged."""
    curved = LowRankMatrix(torch.tensor([[0.6, 0.8]]), torch.tensor([3.0]))
    models = [QuadraticModel(ON_A_PLANE, s * torch.tensor([0.8, -0.6]), curved) for s in (-7.0, 9.0)]
    torch.testing.assert_close(merged_parameters(models)["w"], torch.tensor([0.8, -0.6]))
    dense = [QuadraticModel(m.space, m.anchor, DenseMatrix(m.curvature.dense())) for m in models]
    torch.testing.assert_close(merged_parameters(dense)["w"], torch.tensor([0.8, -0.6]))


def test_what_curves_less_than_its_rounding_is_averaged_and_no_error():
    """In single precision 2e-6 beside 1 is none; a sum has a minimum all the same, with a slope there but for it."""
    models = [
        QuadraticModel(ON_A_PLANE, torch.tensor(anchor), DenseMatrix(torch.tensor([1.0, curved]).diag()))
        for anchor, curved in (([0.0, 0.0], 2e-6), ([1e-3, 10.0], 1e-6))
    ]
    torch.testing.assert_close(merged_parameters(models)["w"], torch.tensor([5e-4, 5.0]))


def test_merging_refuses_a_slope_that_no_model_bends_along():
    curved = [DiagonalMatrix(torch.tensor([c, 0.0])) for c in (3.0, 1.0)]
    one = QuadraticModel(ON_A_PLANE, torch.ones(2), curved[0], torch.tensor([0.0, 5.0]))
    two = QuadraticModel(ON_A_PLANE, torch.full((2,), 5.0), curved[1])
    with pytest.raises(ValueError, match="leaves the range of C by 5"):
        merged_parameters([one, two])
