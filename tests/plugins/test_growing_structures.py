"""Every structure with every policy while the model grows: folded quadratics against explicit sums over experiences,
and the function of the past, which is frozen before it grows."""

import copy
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from avalanche.models import IncrementalClassifier, MTSimpleMLP, avalanche_forward
from torch import nn

from avalanche_curv import (
    EKFAC,
    GGN,
    Absolute,
    Accumulate,
    BlockDiagonal,
    Clip,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Energy,
    Fisher,
    FlatSpectrum,
    FrobeniusOptimal,
    Hessian,
    KeepTerms,
    Kronecker,
    LowRank,
    MatrixFree,
    Merge,
    PartialTraces,
    Past,
    PerLayer,
    PerParameter,
    PiWeighted,
    Policy,
    Rank,
    Refresh,
    estimate,
)

EXACT = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "blocks of parameters": BlockDiagonal(PerParameter()),
    "blocks of layers": BlockDiagonal(PerLayer()),
    "low rank blocks": BlockDiagonal(PerLayer(), LowRank(Rank(2))),
    "low rank blocks and residual": BlockDiagonal(PerLayer(), LowRank(Energy(0.5), residual=Diagonal())),
    "low rank": LowRank(Rank(3)),
    "low rank and residual": LowRank(Energy(0.7), residual=Diagonal()),
    "flat": FlatSpectrum(LowRank(Rank(3))),
    "kronecker": Kronecker(KeepTerms()),
    "ekfac": EKFAC(KeepTerms()),
    "cut kronecker": Kronecker(KeepTerms(), cut=Rank(1)),
    "cut ekfac": EKFAC(KeepTerms(), cut=Energy(0.5)),
    "matrix free": MatrixFree(),
    "matrix free, in part": MatrixFree(0.5, seed=1),
}


class Remembering(Policy):
    """Another policy, and the risks that it was given."""

    def __init__(self, policy):
        self.policy, self.risks = policy, []

    def absorb(self, past, risk, curvature, structure):
        self.risks.append(risk)
        return self.policy.absorb(past, risk, curvature, structure)


HEADS = "one growing head", "a head for each task"


@pytest.fixture(scope="session")
def trained(make, digits, learner, train):
    """trained(heads) -> (the risks at the ends of three experiences, the model moved a little from there, the past)."""

    @cache
    def run(heads):
        constructor = (
            (lambda: MTSimpleMLP(input_size=64, hidden_size=3)) if heads
            else (lambda: nn.Sequential(nn.Linear(64, 3), nn.Tanh(), IncrementalClassifier(3)))
        )  # fmt: skip
        torch.set_default_dtype(torch.float64)
        try:
            model, benchmark = make(constructor).to(torch.float64), digits(heads, torch.float64)
            ewc = CurvatureEWCPlugin(0.5, policy=Remembering(Accumulate()))
            train(learner(model, ewc, train_mb_size=25), benchmark.train_stream)
        finally:
            torch.set_default_dtype(torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return ewc.policy.risks, model, ewc.past.model

    return run


@pytest.fixture(scope="module", params=HEADS)
def ended(request, trained):
    """(the risks at the ends of three experiences, the model moved a little from there)."""
    return trained(request.param == HEADS[1])[:2]


growing_head = pytest.mark.parametrize("ended", HEADS[:1], indirect=True)


@pytest.mark.parametrize("heads", [False, True], ids=HEADS)
def test_the_plugin_hands_the_past_from_experience_to_experience(heads, trained):
    risks, model, past = trained(heads)
    expected = absorbed(Accumulate(), risks, Fisher(), Diagonal())
    assert past.space == expected.space
    assert_same_function(past, expected.penalty(model), model)


def coordinates(model, space):
    """The parameters that `space` names, in its shapes, attached to the graph."""
    named = dict(model.named_parameters())
    corners = [named[name][tuple(slice(n) for n in shape)] for name, shape in zip(space.names, space.shapes)]
    return torch.cat([corner.reshape(-1) for corner in corners])


def half_form(model, space, matrix, anchor):
    displacement = coordinates(model, space) - anchor
    return 0.5 * displacement @ (matrix @ displacement)


def absorbed(policy, risks, kind, structure):
    past = Past()
    for risk in risks:
        past = policy.absorb(past, risk, kind, structure)
    return past.model


def assert_same_function(past, expected, model):
    parameters = list(model.parameters())
    values = past.penalty(model), expected
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-10)
    got, wanted = (
        torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True) for value in values
    )
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.fixture(scope="module", params=EXACT)
def structure(request, ended):
    return request.param


@pytest.fixture(scope="module")
def separate(structure, ended):
    """A kind, and the space, matrix and anchor that each experience alone gives."""
    risks, _ = ended
    kind = EmpiricalFisher() if "low rank" in structure else GGN()
    alone = [estimate(kind, EXACT[structure], risk) for risk in risks]
    return kind, [(q.space, q.curvature.dense(), q.anchor) for q in alone]


def test_accumulation_is_the_sum_of_separate_quadratics(structure, separate, ended):
    (risks, model), (kind, alone) = ended, separate
    assert alone[0][0].size < alone[-1][0].size  # it has grown
    expected = sum(half_form(model, *q) for q in alone)
    assert expected > 1e-4
    assert_same_function(absorbed(Accumulate(), risks, kind, EXACT[structure]), expected, model)


def test_merging_moves_every_quadratic_to_the_newest_anchor(structure, separate, ended):
    (risks, model), (kind, alone) = ended, separate
    expected = 0
    for age, (space, matrix, _) in enumerate(reversed(alone)):
        anchor = coordinates(risks[-1].base, space).detach()
        expected = expected + 0.5**age * half_form(model, space, matrix, anchor)
    assert_same_function(absorbed(Merge(0.5), risks, kind, EXACT[structure]), expected, model)


@pytest.mark.parametrize(
    ("structure", "gradient"),
    [*((name, True) for name in ("dense", "low rank and residual", "ekfac", "matrix free, in part")), ("dense", False)],
    indirect=["structure"],
)
def test_refreshing_estimates_all_of_the_past_at_the_newest_parameters(structure, gradient, ended):
    risks, model = ended
    newest = risks[-1]
    displacement = coordinates(model, newest.space) - newest.anchor
    expected = 0
    for risk in risks:
        here = risk.at(newest)
        matrix = estimate(GGN(), EXACT[structure], here).curvature.dense()
        expected = expected + half_form(model, newest.space, matrix, newest.anchor)
        if gradient:
            expected = expected + here.gradient() @ displacement
    policy = Refresh(fraction=1.0, gradient=gradient)
    assert_same_function(absorbed(policy, risks, GGN(), EXACT[structure]), expected, model)


@growing_head
@pytest.mark.parametrize(
    ("kind", "structure"),
    [(Hessian(Clip()), Dense()), (Hessian(Clip()), Diagonal()), (Hessian(Absolute()), LowRank(Rank(3), Diagonal())),
     (Hessian(Clip()), BlockDiagonal(PerLayer(), LowRank(Rank(2))))],
    ids=["dense", "diagonal", "low rank and residual", "low rank blocks"],
)
def test_mended_hessians_add_up_too(structure, kind, ended):
    risks, model = ended
    separate = [estimate(kind, structure, risk) for risk in risks]
    expected = sum(half_form(model, q.space, q.curvature.dense(), q.anchor) for q in separate)
    assert_same_function(absorbed(Accumulate(), risks, kind, structure), expected, model)


def embedded(matrix, inner, outer):
    where = outer.positions(inner)
    result = torch.zeros(outer.size, outer.size, dtype=torch.float64)
    result[where[:, None], where] = matrix
    return result


def test_a_sum_of_limited_rank_is_the_best_approximation_of_its_running_sum(ended):
    risks, _ = ended
    structure = LowRank(Rank(3), max_rank=4)
    found = absorbed(Merge(), risks, GGN(), structure).curvature
    total, space = torch.zeros(0, 0, dtype=torch.float64), None
    for risk in risks:
        new = estimate(GGN(), structure, risk)
        total = new.curvature.dense() + (0 if space is None else embedded(total, space, new.space))
        values, vectors = torch.linalg.eigh(total)
        total, space = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T, new.space
    assert len(found.values) == 4
    torch.testing.assert_close(found.dense(), total, rtol=1e-8, atol=1e-10)


FACTORISED = ["kronecker", "ekfac", "cut kronecker", "cut ekfac"]
SUMS = [PartialTraces(), PiWeighted(), FrobeniusOptimal(), KeepTerms(most=2)]


@growing_head
@pytest.mark.parametrize(
    ("policy", "exact", "sums"),
    [
        *product([Merge(0.5)], FACTORISED, SUMS),
        *product([Accumulate(), Refresh(1.0)], FACTORISED[:2], SUMS[:1]),
    ],
    ids=str,
)
def test_merged_factors_keep_trace_and_number_of_terms_while_the_head_grows(policy, exact, sums, ended):
    risks, model = ended
    exact = EXACT[exact]
    merged, kept = (absorbed(policy, risks, GGN(), one) for one in (replace(exact, sums=sums), exact))
    assert max(len(layer.terms) for layer in merged.curvature.layers) == (2 if sums == KeepTerms(most=2) else 1)
    assert merged.curvature.trace() == pytest.approx(kept.curvature.trace())
    assert max(len(layer.terms) for layer in kept.curvature.layers) == 3
    assert merged.penalty(model).isfinite()
    assert torch.linalg.eigvalsh(merged.curvature.dense()).min() > -1e-10


@pytest.mark.parametrize("exact", FACTORISED)
def test_one_pair_has_value_and_slope_of_the_exact_sum_at_the_newest_anchor_of_a_grown_head(exact, ended):
    risks, model = ended[0], copy.deepcopy(ended[1])
    exact = EXACT[exact]
    one, kept = (absorbed(Accumulate(), risks[:2], GGN(), it) for it in (replace(exact, sums=PartialTraces()), exact))
    with torch.no_grad():
        for parameter, values in zip(one.space.tensors(model), one.space.split(one.anchor)):
            parameter.copy_(values)
    assert_same_function(one, kept.penalty(model), model)
    assert one.gradient.norm() > 1e-3


TRAINED = [
    "low rank and residual", "low rank blocks", "flat", "kronecker", "ekfac", "cut kronecker", "matrix free, in part"
]  # fmt: skip


@pytest.mark.parametrize("growing", HEADS[:1], indirect=True)
@pytest.mark.parametrize("structure", TRAINED)
def test_the_plugin_trains_with_every_structure_while_the_model_grows(structure, growing, learner, train):
    model, benchmark = growing()
    ewc = CurvatureEWCPlugin(1.0, curvature=EmpiricalFisher(), structure=EXACT[structure], policy=Merge(0.9))
    slow = torch.optim.SGD(model.parameters(), lr=0.05)
    train(learner(model, ewc, optimizer=slow, train_mb_size=25), benchmark.train_stream)
    assert ewc.past.experiences == 3
    assert 0 < float(ewc.last_penalty) < float("inf")


def test_a_growing_model_keeps_more_of_the_past_with_a_penalty(growing, learner, train):
    penalties = {}
    for strength in (0.0, 3.0):
        model, benchmark = growing()
        ewc = CurvatureEWCPlugin(strength, curvature=Fisher(), structure=Dense(), policy=Refresh(0.5))
        slow = torch.optim.SGD(model.parameters(), lr=0.1)
        train(learner(model, ewc, optimizer=slow, train_mb_size=10), benchmark.train_stream)
        assert ewc.past.experiences == 3
        penalties[strength] = float(ewc.last_penalty)
    assert 0 < penalties[3.0] < penalties[0.0]


def test_the_frozen_past_function_is_that_of_the_model_at_the_end_of_its_experience(
    growing, learner, train, examples, recorder
):
    model, benchmark = growing()
    given = Remembering(Accumulate())
    train(learner(model, CurvatureEWCPlugin(1.0, policy=given), recorder), benchmark.train_stream)
    for task, (risk, end, experience) in enumerate(zip(given.risks, recorder.ends, benchmark.train_stream)):
        inputs, targets = examples(experience)
        label = experience.task_labels[0]
        outputs = avalanche_forward(end, inputs, torch.full((len(targets),), label))
        assert risk.examples == 50
        torch.testing.assert_close(risk.outputs(inputs), outputs)
        assert risk.value() == pytest.approx(nn.CrossEntropyLoss()(outputs, targets).item(), rel=1e-5)
        assert label in (0, task)


def test_new_units_are_free_to_move(ended):
    risks, model = ended[0], copy.deepcopy(ended[1])
    before = estimate(GGN(), Diagonal(), risks[0])
    named = dict(model.named_parameters())
    new = [name for name in named if name not in before.space.names]
    grown = [n for n, shape in zip(before.space.names, before.space.shapes) if named[n].shape != shape]
    assert new or grown
    value = before(model)
    with torch.no_grad():
        for name in new:
            named[name] += 1.0
        for name in grown:
            named[name][before.space.shapes[before.space.names.index(name)][0] :] += 1.0
    assert before(model) == value


@pytest.mark.parametrize("psd", [Clip(), Absolute()], ids=str)
def test_a_hessian_to_be_mended_without_a_matrix_is_refused_when_the_plugin_is_made(psd):
    with pytest.raises(TypeError, match="cannot be mended where only products are known"):
        CurvatureEWCPlugin(1.0, curvature=Hessian(psd), structure=MatrixFree())


@pytest.mark.parametrize("structure", [Kronecker(), EKFAC(), LowRank(Energy(0.9))], ids=["kfac", "ekfac", "energy"])
def test_pairs_that_do_not_go_together_are_refused_when_the_plugin_is_made(structure):
    with pytest.raises(TypeError, match="Hessian"):
        CurvatureEWCPlugin(1.0, curvature=Hessian(Clip()), structure=structure)
