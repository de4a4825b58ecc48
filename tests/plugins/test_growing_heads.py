import pytest
import torch
from avalanche.models import avalanche_forward
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    GGN,
    Accumulate,
    BlockDiagonal,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    Merge,
    Policy,
    Refresh,
    estimate,
)

STRUCTURES = [Dense(), BlockDiagonal(), Diagonal()]


class Remembering(Policy):
    """Another policy, and what it was given."""

    def __init__(self, policy):
        self.policy, self.risks, self.separate = policy, [], []

    def absorb(self, past, risk, curvature, structure):
        self.risks.append(risk)
        self.separate.append(estimate(curvature, structure, risk))
        return self.policy.absorb(past, risk, curvature, structure)


@pytest.fixture
def run(growing, double, learner, train):
    """run(policy, structure, curvature) -> (plugin, what its policy was given, model moved a little from the end)."""

    def trained(policy, structure, curvature=GGN()):  # noqa: B008  a frozen value
        model, benchmark = growing(torch.float64)
        remembering = Remembering(policy)
        ewc = CurvatureEWCPlugin(0.5, curvature=curvature, structure=structure, policy=remembering)
        strategy = train(learner(model, ewc, train_mb_size=25), benchmark.train_stream)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in strategy.model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return ewc, remembering, strategy.model

    return trained


def coordinates(model, space):
    """The parameters that `space` names, in its shapes, attached to the graph."""
    named = dict(model.named_parameters())
    corners = [named[name][tuple(slice(n) for n in shape)] for name, shape in zip(space.names, space.shapes)]
    return torch.cat([corner.reshape(-1) for corner in corners])


def half_form(model, quadratic, anchor, factor=1.0):
    """½ δᵀCδ, by plain operations on the parameters of `model`."""
    displacement = coordinates(model, quadratic.space) - anchor
    return factor * 0.5 * displacement @ (quadratic.curvature.dense() @ displacement)


def assert_same_function(past, expected, model):
    penalty = past.penalty(model)
    torch.testing.assert_close(penalty, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(past(model), expected.detach(), rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    got, wanted = (
        torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        for value in (penalty, expected)
    )
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("curvature", [GGN(), EmpiricalFisher()])
def test_folded_accumulation_is_the_sum_of_separate_quadratics(run, structure, curvature):
    ewc, given, model = run(Accumulate(), structure, curvature)
    spaces = [quadratic.space for quadratic in given.separate]
    assert spaces[0].size < spaces[-1].size  # it has grown
    expected = sum(half_form(model, quadratic, quadratic.anchor) for quadratic in given.separate)
    assert expected > 1e-3
    assert_same_function(ewc.past.model, expected, model)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merging_moves_every_quadratic_to_the_newest_anchor(run, structure):
    ewc, given, model = run(Merge(decay=0.5), structure)
    newest = given.risks[-1].base
    expected = sum(
        half_form(model, quadratic, coordinates(newest, quadratic.space).detach(), 0.5**age)
        for age, quadratic in enumerate(reversed(given.separate))
    )
    assert_same_function(ewc.past.model, expected, model)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("gradient", [False, True])
def test_refreshing_estimates_all_of_the_past_at_the_newest_parameters(run, structure, gradient):
    ewc, given, model = run(Refresh(fraction=1.0, gradient=gradient), structure)
    newest = given.risks[-1]
    anchor = coordinates(newest.base, newest.space).detach()
    expected = torch.zeros(())
    for risk in given.risks:
        quadratic = estimate(GGN(), structure, risk.at(newest))
        expected = expected + half_form(model, quadratic, anchor)
        if gradient:
            expected = expected + slope(risk, newest.base) @ (coordinates(model, newest.space) - anchor)
    assert_same_function(ewc.past.model, expected, model)


def slope(risk, model):
    """The gradient of the mean loss of a risk's examples at another model."""
    (inputs, targets), task = next(iter(risk.batches)), getattr(risk.forward, "task", 0)
    outputs = avalanche_forward(model, inputs, torch.full((len(targets),), task))
    parts = torch.autograd.grad(
        cross_entropy(outputs, targets), list(model.parameters()), allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


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


def test_new_units_are_free_to_move(run):
    _, given, model = run(Accumulate(), Diagonal())
    before = given.separate[0]
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


@pytest.mark.parametrize(
    ("structure", "policy"), [(Dense(), Refresh(0.5)), (BlockDiagonal(), Merge(0.9)), (Diagonal(), Accumulate())]
)
def test_a_growing_model_keeps_more_of_the_past_with_a_penalty(structure, policy, growing, learner, train):
    penalties = {}
    for strength in (0.0, 3.0):
        model, benchmark = growing()
        ewc = CurvatureEWCPlugin(strength, curvature=Fisher(), structure=structure, policy=policy)
        slow = torch.optim.SGD(model.parameters(), lr=0.1)
        train(learner(model, ewc, optimizer=slow, train_mb_size=10), benchmark.train_stream)
        assert ewc.past.experiences == 3
        penalties[strength] = float(ewc.last_penalty)
    assert 0 < penalties[3.0] < penalties[0.0]
