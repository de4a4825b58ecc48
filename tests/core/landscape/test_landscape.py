import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    BatchedEmpiricalFisher,
    Clip,
    Curvature,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    GramMatrix,
    Hessian,
    Lanczos,
    NonFiniteCurvatureError,
    WholeMatrix,
    alignment,
    curvature_drift,
    landscape,
)
from avalanche_curv.core import eigen
from avalanche_curv.core.landscape import exact as exact_spectra
from avalanche_curv.core.landscape.landscape import moved, overlap
from avalanche_curv.core.landscape.spectrum import QUANTITIES

EXACT = [WholeMatrix(), GramMatrix()]
LANCZOS = Lanczos(probes=40, steps=100)
SAMPLED = 0.1  # what sums over so many probes deviate by at most here, relative


def numbers_on_paper(matrix, k, epsilon):
    """The five numbers of a symmetric matrix, from its eigenvalues."""
    values = torch.linalg.eigvalsh(matrix)
    sizes = values.abs().sort(descending=True).values
    p = sizes[sizes > 0] / sizes.sum()
    return {
        "sharpness": float(values.max()),
        "trace": float(matrix.diagonal().sum()),
        "numerical_rank": float((values > epsilon * values.max()).sum()),
        "effective_rank": math.exp(-float((p * p.log()).sum())),
        "energy": float(sizes[:k].sum() / sizes.sum()),
    }


def scalars(found):
    return {name: value for name, value in found.numbers().items() if name != "exact"}


@dataclass(frozen=True)
class Prescribed(Curvature):
    """A matrix that does not depend on the model."""

    matrix: torch.Tensor

    def operator(self, risk):
        return self

    @property
    def size(self):
        return len(self.matrix)

    def matmat(self, columns):
        return self.matrix.to(columns) @ columns


def with_eigenvalues(values, seed=0):
    """A symmetric matrix with those eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T


def linear_risk(inputs, make_model):
    """Squared error of f(x) = wᵀx, of which the Hessian is 2 XᵀX / N."""
    model = make_model(lambda: nn.Linear(inputs.shape[1], 1, bias=False))
    targets = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    return EmpiricalRisk.snapshot(model, nn.MSELoss(), list(zip(inputs.split(4), targets.split(4))))


def risk_of_size(size, make_model):
    return linear_risk(torch.zeros(1, size, dtype=torch.float64), make_model)


@pytest.mark.parametrize("method", [*EXACT, LANCZOS])
@pytest.mark.parametrize("curvature", [GGN(), Fisher(), Hessian()])
def test_linear_regression_has_the_spectrum_of_its_inputs(curvature, method, make_model):
    if curvature == Hessian() and method == GramMatrix():
        return
    inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = landscape(curvature, linear_risk(inputs, make_model), k=6, methods=[method])
    expected = numbers_on_paper(2 * inputs.T @ inputs / 9, 6, 1e-2)  # nothing is left to sample
    assert scalars(found) == pytest.approx(expected, rel=1e-9)
    assert found.examples == 9


def test_numbers_of_a_prescribed_spectrum_are_those_on_paper(make_model):
    values = [8.0, 4.0, 2.0, 1.0, 1.0, *([0.0] * 7)]
    inputs = (torch.as_tensor(values, dtype=torch.float64) * 12 / 2).sqrt().diag()
    found = landscape(GGN(), linear_risk(inputs, make_model), k=2, epsilon=0.2)
    entropy = (math.log(2) * 1 / 2) + (math.log(4) * 1 / 4) + (math.log(8) * 1 / 8) + 2 * (math.log(16) * 1 / 16)
    assert found.numbers() == pytest.approx({
        "sharpness": 8.0,
        "trace": 16.0,
        "numerical_rank": 3.0,  # above 1.6
        "effective_rank": math.exp(entropy),
        "energy": 12 / 16,
        "exact": 1.0,
    })
    assert found.top[0].tolist() == pytest.approx([8.0, 4.0])
    torch.testing.assert_close(found.top[1].abs(), torch.eye(12, dtype=torch.float64)[:2])


def kinds(paper):
    return {
        GGN(): paper.ggns.mean(0),
        Fisher(): paper.ggns.mean(0),  # of softmax cross-entropy
        EmpiricalFisher(): paper.empirical_fishers.mean(0),
        Hessian(): paper.hessians.mean(0),
        BatchedEmpiricalFisher(batch_size=3): (lambda g: g.T @ g / len(g))(paper.batch_gradients(3)),
    }


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_equal_the_eigenvalues_of_the_explicit_matrix(method, large, architecture, problem, monkeypatch):
    if large:  # as for matrices that are too large for all their eigenvectors
        monkeypatch.setattr(exact_spectra, "WHOLE", 5)
        monkeypatch.setattr(eigen, "WHOLE", 5)
    case = problem(architecture, "cross_entropy")
    for curvature, matrix in kinds(case.paper).items():
        if isinstance(curvature, Hessian) and isinstance(method, GramMatrix):
            continue
        found = landscape(curvature, case.risk, k=2, epsilon=1e-3, methods=[method])
        assert scalars(found) == pytest.approx(numbers_on_paper(matrix, 2, 1e-3), rel=1e-6, abs=1e-12), curvature
        check_density(found.density, matrix)
        check_pairs(found.top, matrix, 1e-4 if large else 1e-6)
        assert found.exact
        assert set(found.methods) == set(QUANTITIES)
        assert all(("Gram matrix" in said) == isinstance(method, GramMatrix) for said in found.methods.values())


def check_density(density, matrix):
    every = density.nodes.repeat_interleave(density.counts.long()).sort().values
    torch.testing.assert_close(every, torch.linalg.eigvalsh(matrix), rtol=1e-6, atol=1e-9 * float(matrix.norm()))


def check_pairs(top, matrix, tolerance):
    values, rows = top
    expected = torch.linalg.eigvalsh(matrix)
    expected = expected[expected.abs().argsort(descending=True)][: len(values)]
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    torch.testing.assert_close(rows @ matrix, values[:, None] * rows, rtol=0, atol=tolerance * float(values[0].abs()))
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=1e-6)


def trace_noise(matrix, k):
    """Three standard deviations of a random trace of 15 vectors, √(2/15) ‖C − VΛVᵀ‖_F (Hutchinson 1989)."""
    left = torch.linalg.eigvalsh(matrix).abs().sort().values[: len(matrix) - k]
    return 3 * (2 / 15) ** 0.5 * float(left.norm())


def test_lanczos_finds_the_top_of_the_explicit_matrix_and_samples_the_rest(architecture, problem, monkeypatch):
    monkeypatch.setattr(eigen, "WHOLE", 5)
    case = problem(architecture, "cross_entropy")
    for curvature, matrix in kinds(case.paper).items():
        found = landscape(curvature, case.risk, k=3, epsilon=1e-3, methods=[LANCZOS])
        expected = numbers_on_paper(matrix, 3, 1e-3)
        check_pairs(found.top, matrix, 1e-4)
        assert found.sharpness == pytest.approx(expected["sharpness"], rel=1e-6)
        semidefinite = curvature != Hessian()
        assert found.trace == pytest.approx(expected["trace"], abs=1e-9 if semidefinite else trace_noise(matrix, 3))
        assert found.energy == pytest.approx(expected["energy"], rel=1e-5 if semidefinite else SAMPLED)
        assert found.numerical_rank == pytest.approx(expected["numerical_rank"], rel=SAMPLED), curvature
        assert found.effective_rank == pytest.approx(expected["effective_rank"], rel=SAMPLED), curvature
        assert found.density.size == pytest.approx(len(matrix))
        assert not found.exact
        assert found.methods["trace"] == ("exact diagonal" if semidefinite else "XTrace, 30 products")


def test_lanczos_with_few_probes_is_unbiased_and_near(make_model):
    """1200 eigenvalues of which 60 count, in a model too large for its parameters' matrix to be decomposed."""
    values = [*torch.logspace(1, -1, 60, dtype=torch.float64).tolist(), *torch.linspace(1e-4, 0, 1140).tolist()]
    curvature, risk = Prescribed(with_eigenvalues(values)), risk_of_size(1200, make_model)
    found = [landscape(curvature, risk, k=10, epsilon=1e-3, methods=[Lanczos(seed=seed)]) for seed in range(12)]
    expected = numbers_on_paper(torch.as_tensor(values).double().diag(), 10, 1e-3)
    assert [one.sharpness for one in found] == pytest.approx([10] * 12, rel=1e-6)
    assert expected["numerical_rank"] == 60
    for name, tolerance in (("trace", 0.05), ("numerical_rank", 0.2), ("effective_rank", 0.2), ("energy", 0.2)):
        values = [getattr(one, name) for one in found]
        assert values == pytest.approx([expected[name]] * 12, rel=tolerance), name
        assert sum(values) / 12 == pytest.approx(expected[name], rel=0.05), name
    again = landscape(curvature, risk, k=10, epsilon=1e-3, methods=[Lanczos(seed=0)])
    assert again.numbers() == found[0].numbers() != found[1].numbers()


def test_the_errors_that_lanczos_states_are_those_that_it_makes(make_model, monkeypatch):
    """Of an indefinite matrix, whose trace of 2 is what is left of a sum of |λ| of about 60."""
    monkeypatch.setattr(eigen, "WHOLE", 5)
    positive = torch.linspace(0.05, 1, 60, dtype=torch.float64)
    matrix = with_eigenvalues([*positive.tolist(), *(-positive * (1 - 2 / positive.sum())).tolist()])
    expected, runs = numbers_on_paper(matrix, 4, 1e-2), 25
    found = [
        landscape(Prescribed(matrix), risk_of_size(120, make_model), k=4, methods=[Lanczos(probes=8, steps=80, seed=s)])
        for s in range(runs)
    ]
    assert expected["trace"] == pytest.approx(2)
    for name in ("trace", "effective_rank", "energy"):
        scores = torch.tensor([(getattr(one, name) - expected[name]) / one.errors[name] for one in found])
        assert 0.5 < scores.square().mean().sqrt() < 2, name
    assert max(abs(one.trace - 2) for one in found) > 0.2  # it is no small one
    assert {one.errors["sharpness"] for one in found} == {0}
    whole = landscape(Prescribed(matrix), risk_of_size(120, make_model), methods=[WholeMatrix()])
    assert set(whole.errors.values()) == {0}
    single = landscape(Prescribed(matrix), risk_of_size(120, make_model), methods=[Lanczos(probes=1)])
    assert math.isnan(single.errors["energy"])


@pytest.mark.parametrize("method", [WholeMatrix(), Lanczos(probes=100, steps=100)])
@pytest.mark.parametrize(
    ("values", "sharpness", "rank"),
    [
        ([3.0, 1.0, -5.0, -4.0], 3.0, 2),
        ([-1.0, -2.0, -7.0, -4.0], -1.0, 0),  # no curvature upward at all
        ([0.5, -2.0, -7.0, -4.0], 0.5, 1),
    ],
)
def test_an_indefinite_matrix_has_the_largest_eigenvalue_and_not_the_largest_magnitude_as_sharpness(
    values, sharpness, rank, method, make_model, monkeypatch
):
    monkeypatch.setattr(eigen, "WHOLE", 5)
    lists = [*values, *torch.linspace(-0.01, -0.001, 36).tolist()] if sharpness > 0 else values * 10
    matrix = with_eigenvalues(lists)
    found = landscape(Prescribed(matrix), risk_of_size(40, make_model), k=2, epsilon=0.1, methods=[method])
    expected = numbers_on_paper(matrix, 2, 0.1)
    assert (expected["sharpness"], expected["numerical_rank"]) == pytest.approx((sharpness, rank))
    for name, tolerance in (
        ("sharpness", 1e-4), ("trace", 5e-2), ("numerical_rank", 0.15), ("effective_rank", 0.05), ("energy", 0.05)
    ):  # fmt: skip
        assert getattr(found, name) == pytest.approx(expected[name], rel=tolerance), name
    assert found.top[0][0] == pytest.approx(min(values), rel=1e-4)


@pytest.mark.parametrize("method", [WholeMatrix(), Lanczos()])
def test_a_matrix_of_zeros_has_no_directions(method, make_model, monkeypatch):
    monkeypatch.setattr(eigen, "WHOLE", 5)
    found = landscape(Prescribed(torch.zeros(40, 40)), risk_of_size(40, make_model), methods=[method])
    assert (found.sharpness, found.trace, found.numerical_rank) == (0, 0, 0)
    assert math.isnan(found.effective_rank)
    assert math.isnan(found.energy)
    assert found.top[1].shape == (0, 40)


def test_eigenvalues_come_where_divide_and_conquer_fails(problem, monkeypatch):
    def failing(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    case = problem("mlp", "cross_entropy")
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    for method in EXACT:
        found = landscape(GGN(), case.risk, k=2, methods=[method])
        assert scalars(found) == pytest.approx(numbers_on_paper(case.paper.ggns.mean(0), 2, 1e-2), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_trace_by_products_of_a_matrix_of_low_rank(rank, make_model, monkeypatch):
    monkeypatch.setattr(eigen, "WHOLE", 5)
    values = torch.tensor([*range(1, rank + 1), *([0] * (50 - rank))], dtype=torch.float64)
    for matrix in (values.diag(), with_eigenvalues(values)):
        found = landscape(Prescribed(matrix), risk_of_size(50, make_model), methods=[Lanczos(steps=20)])
        assert found.trace == pytest.approx(rank * (rank + 1) / 2, rel=1e-6)
        assert len(found.top[0]) == rank


def test_the_first_method_that_applies_is_taken(problem, make_model):
    case = problem("mlp", "cross_entropy")  # 43 parameters, 7 examples of 2 columns
    cases = [
        ((WholeMatrix(43), GramMatrix(), Lanczos()), "eigendecomposition of all 43 rows"),
        ((WholeMatrix(42), GramMatrix(14), Lanczos()), "Gram matrix of 14 rows"),
        ((WholeMatrix(42), GramMatrix(13), Lanczos(2, 9)), "stochastic Lanczos quadrature, 2 probes of 9 steps"),
    ]
    for methods, said in cases:
        assert landscape(GGN(), case.risk, methods=methods).methods["density"] == said
    with pytest.raises(ValueError, match=r"None of the methods .* 43 parameters.*add Lanczos\(\)"):
        landscape(GGN(), case.risk, methods=[WholeMatrix(42)])
    with pytest.raises(ValueError, match="None of the methods"):
        landscape(Hessian(), case.risk, methods=[GramMatrix()])


class TwoHeads(nn.Module):
    """A trunk with a convolution, whose rows are formed, and linear layers, whose rows are not."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3), nn.Tanh()
        )
        self.heads = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])


@dataclass(frozen=True)
class Head:
    number: int

    def __call__(self, model, x):
        return model.heads[self.number](model.trunk(x))


@pytest.mark.parametrize("method", [*EXACT, LANCZOS])
def test_several_heads_have_the_spectrum_of_the_mean_over_all_examples(method, make_model, monkeypatch):
    monkeypatch.setattr(eigen, "WHOLE", 5)
    model = make_model(TwoHeads)
    generator = torch.Generator().manual_seed(0)
    risks, gradients = [], []
    for number, size in ((0, 5), (1, 3), (0, 4)):
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (size,), generator=generator)
        risks.append(EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)], forward=Head(number)))
        for one, label in zip(x, y):
            loss = nn.functional.cross_entropy(Head(number)(model, one[None]), label[None])
            parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([part.reshape(-1) for part in parts]))
    rows = torch.stack(gradients)
    matrix = rows.T @ rows / 12
    found = landscape(EmpiricalFisher(), *(risk.at(risks[0]) for risk in risks), k=4, methods=[method])
    expected = numbers_on_paper(matrix, 4, 1e-2)
    check_pairs(found.top, matrix, 1e-4)
    assert found.examples == 12
    tolerance = 1e-6 if found.exact else SAMPLED
    assert scalars(found) == pytest.approx(expected, rel=tolerance)
    batched = landscape(BatchedEmpiricalFisher(1), *(risk.at(risks[0]) for risk in risks), k=4, methods=[method])
    assert scalars(batched) == pytest.approx(expected, rel=tolerance)


def test_single_precision_is_good_to_four_digits(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(30) % 3
    exact = landscape(GGN(), EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)]))
    risk = EmpiricalRisk.snapshot(model.float(), nn.CrossEntropyLoss(), [(x.float(), y)])
    for method in EXACT:
        assert scalars(landscape(GGN(), risk, methods=[method])) == pytest.approx(scalars(exact), rel=1e-4)


@pytest.mark.parametrize("method", [*EXACT, Lanczos()])
def test_measuring_draws_nothing_and_changes_nothing(method, problem):
    case = problem("mlp", "cross_entropy")
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    landscape(GGN(), case.risk, methods=[method])
    if not isinstance(method, GramMatrix):
        landscape(Hessian(), case.risk, methods=[method])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert all(p.grad is None for p in case.risk.parameters)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_alignment_and_leakage_are_the_legs_of_a_triangle(k):
    generator = torch.Generator().manual_seed(k)
    rows = torch.linalg.qr(torch.randn(20, k, generator=generator, dtype=torch.float64)).Q.T
    vector = torch.randn(20, generator=generator, dtype=torch.float64)
    away = vector - (rows @ vector) @ rows
    for one, inside in ((3 * rows[0], 1), (away, 0), (vector, float((rows @ vector).norm() / vector.norm()))):
        found = alignment(one, rows)
        assert found.inside == pytest.approx(inside, abs=1e-12)
        assert found.leakage == pytest.approx(max(0, 1 - inside**2) ** 0.5, abs=1e-12)
    none = alignment(torch.zeros(20), rows.float())
    assert math.isnan(none.inside)
    assert math.isnan(none.leakage)


def test_overlap_is_one_for_the_same_span_and_the_share_of_dimensions_for_random_ones():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(401, 50, 5, generator=generator, dtype=torch.float64)
    first, *others = torch.linalg.qr(draw).Q.mT
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert overlap(first, turn @ first) == pytest.approx(1)
    assert overlap(first, first[:3]) == pytest.approx(3 / 5) == overlap(first[:3], first)
    assert sum(overlap(first, other) for other in others) / 400 == pytest.approx(5 / 50, rel=0.1)
    angle = torch.tensor(0.3)
    line = torch.stack([angle.cos(), angle.sin()])[None]
    assert overlap(torch.eye(2)[:1], line) == pytest.approx(math.cos(0.3) ** 2, rel=1e-6)


def test_the_curvature_of_a_linear_model_does_not_drift_and_that_of_larger_inputs_is_larger(make_model):
    inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    risk, larger = linear_risk(inputs, make_model), linear_risk(3 * inputs, make_model)
    elsewhere = make_model(lambda: nn.Linear(6, 1, bias=False), seed=5)
    then, now = landscape(GGN(), risk, k=2), landscape(GGN(), *moved([risk], elsewhere), k=2)
    assert not torch.equal(moved([risk], elsewhere)[0].anchor, risk.anchor)
    for other, ratio in ((now, 1), (landscape(GGN(), larger, k=2), 9)):
        found = curvature_drift(then, other)
        assert found.trace_ratio == pytest.approx(ratio)
        assert found.overlap == pytest.approx(1)


def test_curvature_of_a_grown_model_is_compared_where_both_have_coordinates(make_model):
    inputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    grown = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    found = curvature_drift(*(landscape(GGN(), linear_risk(x, make_model), k=2) for x in (inputs, grown)))
    assert found.trace_ratio == pytest.approx(1)
    assert found.overlap == pytest.approx(1 / 2)


def test_moving_keeps_the_past_function_and_takes_only_parameters(make_model):
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    model, later = make_model(build), make_model(build, seed=1)
    later[1].running_mean += 5
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(x, y)])
    before = risk.anchor.clone()
    (there, again) = moved([risk, risk], later)
    assert torch.equal(there.anchor, risk.space.vector(later))
    assert not there.base[1].running_mean.any()
    assert there.base is again.base
    assert torch.equal(risk.space.vector(risk.base), before)


def test_unusable_input_is_refused_with_a_remedy(problem, make_model):
    risk = problem("mlp", "cross_entropy").risk
    other = problem("conv", "cross_entropy").risk
    cases = [
        (TypeError, r"got <class .*Fisher'>. Did you mean Fisher\(\)", (Fisher, risk), {}),
        (TypeError, r"as it is; got Hessian\(psd=Clip\(\)\). Use Hessian\(\)", (Hessian(psd=Clip()), risk), {}),
        (ValueError, "got none. Give one or more", (GGN(),), {}),
        (ValueError, r"Freeze them alike: .*risk.at\(newest\)", (GGN(), risk, other), {}),
        (ValueError, "k must be an integer of at least 1; got 0", (GGN(), risk), {"k": 0}),
        (ValueError, r"epsilon must lie in \[0, 1\).*got 1.5", (GGN(), risk), {"epsilon": 1.5}),
        (TypeError, r"methods must be a sequence such as .*got Lanczos", (GGN(), risk), {"methods": Lanczos()}),
        (TypeError, "methods must be a sequence", (GGN(), risk), {"methods": ["lanczos"]}),
        (ValueError, "log-likelihood", (Fisher(), problem("mlp", "weighted").risk), {}),
    ]
    for kind, message, args, options in cases:
        with pytest.raises(kind, match=message):
            landscape(*args, **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (WholeMatrix, {"largest": 0}, r"WholeMatrix\(largest=...\) must be an integer of at least 1; got 0"),
        (Lanczos, {"trace_products": 7}, "must be even, as XTrace is; got 7"),
    ],
)
def test_a_method_refuses_unusable_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("method", [*EXACT, Lanczos()])
def test_a_diverged_model_has_no_landscape(method, make_model):
    model = make_model(lambda: nn.Linear(3, 2))
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))])
    nn.init.constant_(model.weight, math.nan)
    with pytest.raises(NonFiniteCurvatureError, match="diverged weights"):
        landscape(GGN(), *moved([risk], model), methods=[method])
    with pytest.raises(NonFiniteCurvatureError, match="holds NaN"):
        landscape(Prescribed(torch.full((8, 8), math.nan)), risk, methods=[WholeMatrix(), Lanczos()])
