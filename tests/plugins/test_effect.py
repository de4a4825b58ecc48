"""A penalty that does nothing says so, once, with what to try."""

import copy
import warnings

import pytest
import torch
from torch import nn

from avalanche_curv import (
    Accumulate,
    AdaptiveRefresh,
    CurvatureEWC,
    CurvatureEWCPlugin,
    Dense,
    ParameterSpace,
    QuadraticModel,
    Refresh,
    suggest_strength,
)
from avalanche_curv.core.quadratic import effect as of_steps
from avalanche_curv.core.quadratic.paces import share_of_step
from avalanche_curv.core.structures.diagonal import DiagonalMatrix

IDLE, LOST = "penalty did nothing", "nothing is left of earlier classes"


@pytest.fixture
def run(make, digits):
    """run(strength, task_labels=False, ...) -> (strategy, texts of warnings): three pairs of digits, each evaluated."""
    from avalanche.models import MTSimpleMLP
    from avalanche.training.plugins import EvaluationPlugin

    def trained(strength, task_labels=False, evaluations=1, experiences=3, rate=0.02, inside=False, **options):
        stream = digits(task_labels)
        single = lambda: nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))  # noqa: E731
        model = make((lambda: MTSimpleMLP(64, hidden_size=20)) if task_labels else single)
        strategy = CurvatureEWC(
            model=model, optimizer=torch.optim.Adam(model.parameters(), rate), strength=strength, train_mb_size=10,
            train_epochs=4, evaluator=EvaluationPlugin(), **options,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            for experience in stream.train_stream[:experiences]:
                strategy.train(experience, eval_streams=[stream.test_stream] if inside else [])
                for _ in range(evaluations):
                    strategy.eval(stream.test_stream)
        return strategy, [str(warning.message) for warning in caught]

    return trained


def test_class_incrementally_a_fixed_anchor_warns_once_and_sends_to_stored_examples(run):
    _, texts = run(100.0, evaluations=2)
    assert [LOST in text for text in texts] == [True]
    assert "of 50 examples 0.0% are recognised, and guessing gets 25.0%; 100% are taken for the newest" in texts[0]
    assert "no strength of a penalty with a fixed anchor prevents that. Store examples: policy=AdaptiveR" in texts[0]


def test_with_heads_for_tasks_and_a_strength_of_the_grid_nothing_is_said(run):
    strategy, texts = run(20.0, task_labels=True)
    assert texts == []
    assert strategy.ewc._classes.kept.right > 0.95


@pytest.mark.parametrize("policy", [Accumulate(), Refresh(0.2), AdaptiveRefresh(fraction=0.2)], ids=lambda p: type(p))
def test_a_strength_that_moves_no_step_warns_once_with_the_numbers_of_suggest_strength(policy, run):
    strategy, texts = run(1e-9, task_labels=True, experiences=2, policy=policy)
    assert [IDLE in text for text in texts] == [True]
    assert "in experience 1: at strength 1e-09 its part in a step, where the past depends on it, was never" in texts[0]
    assert str(suggest_strength(strategy.past, strategy.optimizer, strategy.model)) in texts[0]


def test_stored_examples_that_do_not_help_are_told_from_none(run):
    _, texts = run(1e-3, policy=Refresh(0.2), experiences=2)
    assert "AdaptiveRefresh() holds best, at strength 1 or" in texts[-1]


def test_of_several_plugins_the_idle_one_speaks_of_steps_and_one_speaks_of_accuracy(run):
    _, texts = run(1e-9, plugins=[CurvatureEWCPlugin(0.0), CurvatureEWCPlugin(30.0)])
    assert sorted(text.split(":")[0] for text in texts) == [
        "At strength 30 nothing is left of earlier classes", "The penalty did nothing in experience 1",
    ]  # fmt: skip


def test_strength_0_only_measures_and_evaluations_in_training_do_not_count(run):
    assert run(0.0)[1] == []
    assert run(100.0, evaluations=0, experiences=2, inside=True, eval_every=1)[1] == []


def test_the_looks_at_steps_change_nothing(run, monkeypatch):
    looked = run(10.0, evaluations=0)[0]
    monkeypatch.setattr(of_steps.StepEffect, "look", lambda *args: None)
    without = run(10.0, evaluations=0)[0]
    for ours, theirs in zip(looked.model.parameters(), without.model.parameters()):
        assert torch.equal(ours, theirs)


def test_a_regression_has_no_classes_to_lose(regression, learner, make, train):
    model = make(lambda: nn.Linear(3, 2)).double()
    strategy = learner(model, CurvatureEWCPlugin(10.0, structure=Dense()), criterion=nn.MSELoss())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(strategy, regression.train_stream[:2], eval_streams=[]).eval(regression.test_stream[:1])


def stepped(model, optimizer, gradients):
    """The step that these gradients give a copy of the optimizer on a copy of the model."""
    model, optimizer = copy.deepcopy((model, optimizer))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient.clone()
    optimizer.step()
    return torch.cat([(p.detach() - old).flatten() for p, old in zip(model.parameters(), before)])


def sgd(model):
    first, second = model
    return torch.optim.SGD([{"params": first.parameters(), "lr": 0.3}, {"params": second.parameters(), "lr": 0.01}])


def adam(model):
    """With second moments that hardly change and no first ones, so that steps are linear in gradients."""
    found = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 1 - 1e-13), eps=1e-2)
    for parameter in model.parameters():
        seconds = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        found.state[parameter] = {"step": torch.tensor(1e15), "exp_avg": 0 * seconds, "exp_avg_sq": seconds}
    return found


@pytest.mark.parametrize("optimizer_of", [sgd, adam])
def test_the_share_of_a_penalty_in_a_step_is_that_of_the_steps_with_and_without_it(optimizer_of, make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    space = ParameterSpace.of_parameters(model, list(model.named_parameters())[:3])  # the last bias came later
    curvature = DiagonalMatrix(torch.arange(1.0, space.size + 1).double())
    past = QuadraticModel(space, torch.zeros(space.size).double(), curvature)
    optimizer, strength = optimizer_of(model), 3.0
    pulls = [*space.split(strength * curvature.values * space.vector(model)), torch.zeros(1).double()]
    tasks = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).double() for p in model.parameters()]
    whole = stepped(model, optimizer, [a + b for a, b in zip(tasks, pulls)])
    steps = torch.stack([whole - stepped(model, optimizer, tasks), whole])[:, : space.size]
    part, whole = (steps.square() @ curvature.values).sqrt()
    expected = part / whole
    for parameter, task, pull in zip(model.parameters(), tasks, pulls):
        parameter.grad = task + pull
    assert share_of_step(optimizer, model, past, strength) == pytest.approx(float(expected), rel=1e-6)


def test_the_largest_share_of_an_experience_counts_and_short_ones_are_judged_together(monkeypatch):
    shares, effect = [], of_steps.StepEffect()
    monkeypatch.setattr(of_steps, "share_of_step", lambda *args: shares.pop(0))

    def verdict_after(updates, *seen):
        shares[:] = seen
        for _ in range(updates):
            effect.look(None, None, None, 1.0)
        assert not shares
        return effect.negligible()

    assert verdict_after(5) is None
    assert verdict_after(30, 1e-4, 2e-4, 1e-5) == 2e-4  # updates 8, 16 and 32 of 35
    assert verdict_after(40, 1e-9, 2e-2, 1e-9) is None
    assert verdict_after(8, float("nan")) is None
    assert verdict_after(7) is None
