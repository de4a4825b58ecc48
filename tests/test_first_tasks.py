"""λ from the first tasks: what is scored, which strategy goes on, and what is refused."""

import math
import re
import warnings

import pytest
import torch
from avalanche.models import SimpleMLP, as_multitask
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin

from avalanche_curv import CurvatureEWC, Evidence, SplitDigits, choose_strength, first_tasks, suggest_strength


@pytest.fixture(scope="module")
def stream():
    return SplitDigits(task_labels=True, seed=0)


def maker(rate=0.05, epochs=1, made=None):
    def make(strength):
        torch.manual_seed(3)
        model = as_multitask(SimpleMLP(input_size=64, hidden_size=20), "classifier")
        strategy = CurvatureEWC(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=rate), strength=strength, guard=None,
            train_mb_size=32, train_epochs=epochs, evaluator=EvaluationPlugin(),
        )  # fmt: skip
        if made is not None:
            made[strength] = strategy
        return strategy

    return make


def by_hand(strategy, experiences):
    """Average accuracy, example by example."""
    strategy.model.eval()
    rates = []
    for experience in experiences:
        right = [
            int(strategy.model(x[None], torch.tensor([t])).argmax()) == int(y) for x, y, t in experience.dataset.eval()
        ]
        rates.append(sum(right) / len(right))
    return sum(rates) / len(rates)


def test_the_best_on_held_out_examples_goes_on(stream):
    made = {}
    tasks, held_out = stream.train_stream[:2], stream.test_stream[:2]
    chosen = choose_strength(maker(made=made), tasks, held_out, strengths=(1000, 0, 10))
    assert list(chosen.scores) == [1000.0, 0.0, 10.0]
    for strength, strategy in made.items():
        assert chosen.scores[strength] == pytest.approx(by_hand(strategy, held_out))
        assert strategy.clock.train_exp_counter == 2
    assert chosen.strategy is made[chosen.strength]
    highest = max(chosen.scores.values())
    assert chosen.strength == min(strength for strength, score in chosen.scores.items() if score == highest)
    chosen.strategy.train(stream.train_stream[2:3])
    assert chosen.strategy.past.experiences == 3


def test_without_strengths_they_are_those_of_the_readme(stream):
    made = {}
    chosen = choose_strength(maker(made=made), stream.train_stream[:2], stream.test_stream[:2])
    first = made[100.0]
    suggested = suggest_strength(first.past, first.optimizer, first.model).grid
    assert [*chosen.scores] == [100.0, *(one for one in suggested if one != 100.0)]


@pytest.mark.parametrize(
    ("strengths", "scores", "said"),
    [
        ((1.0, 10.0, 100.0), (0.7, 0.8, 0.9), r"100, is the largest .* a larger one .*strengths=\(100, 1000, 10000\)"),
        ((1.0, 10.0, 100.0), (0.9, 0.8, 0.7), r"1, is the smallest .* a smaller one .*strengths=\(0.01, 0.1, 1\)"),
        ((1.0, 10.0, 100.0), (0.8, 0.9, 0.7), None),
        ((1.0, 10.0, 1e9), (0.8, 0.9, math.nan), None),  # a larger one was tried
        ((0.0, 10.0), (0.9, 0.8), None),  # none is smaller
        ((0.0, 10.0), (0.8, 0.9), r"10, is the largest"),
        ((10.0,), (0.9,), r"10 is the only one .* compared with none. .*strengths=\(1, 10, 100\)"),
        ((0.0,), (0.9,), r"0 is the only one .* compared with none. .*strengths=\(1, 10, 100\)"),
    ],
)
def test_the_best_at_an_end_of_what_was_tried_is_said(strengths, scores, said, stream, monkeypatch):
    told = iter(scores)
    monkeypatch.setattr(first_tasks, "_score", lambda *_: next(told))
    tasks, held_out = stream.train_stream[:2], stream.test_stream[:2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = choose_strength(maker(), tasks, held_out, strengths=strengths)
    found = [one for one in caught if "strengths=(" in str(one.message)]
    assert chosen.is_at_end == bool(found) == (said is not None)
    if said is not None:
        assert re.search(said, str(found[0].message))
        assert found[0].filename == __file__


def test_why_the_strengths_were_suggested_is_said_where_the_best_is_at_their_end(stream, monkeypatch):
    scores = []
    monkeypatch.setattr(first_tasks, "_score", lambda strategy, tasks, _: scores.append(strategy.train(tasks)) or 0.5)
    with pytest.warns(UserWarning, match=r"the smallest that was tried \(descent on .* up to strength .*\): a small"):
        choose_strength(maker(), stream.train_stream[:2], stream.test_stream[:2])
    assert len(scores) == 5


def test_a_strength_that_diverges_is_not_chosen(stream):
    chosen = choose_strength(
        maker(), stream.train_stream[:3], stream.test_stream[:3], strengths=(1e9, 1.0)
    )
    assert chosen.strength == 1.0
    assert math.isnan(chosen.scores[1e9])
    with pytest.raises(ValueError, match="diverged at each strength"):
        choose_strength(maker(), stream.train_stream[:3], stream.test_stream[:3], strengths=(1e9,))


def test_bad_input_is_refused_with_a_remedy(stream):
    tasks, held_out = stream.train_stream, stream.test_stream
    with pytest.raises(ValueError, match=r"got 1 and 1. Give train_stream\[:3\]"):
        choose_strength(maker(), tasks[:1], held_out[:1])
    with pytest.raises(ValueError, match="got 2 and 3"):
        choose_strength(maker(), tasks[:2], held_out[:3])
    with pytest.raises(ValueError, match="strengths must be a finite number, at least 0"):
        choose_strength(maker(), tasks[:2], held_out[:2], strengths=(-1.0,))
    with pytest.raises(ValueError, match="needs strengths to try"):
        choose_strength(maker(), tasks[:2], held_out[:2], strengths=())

    def plain(strength):
        model = SimpleMLP(input_size=64)
        return Naive(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(TypeError, match=r"got Naive. Return CurvatureEWC\(strength"):
        choose_strength(plain, tasks[:2], held_out[:2], strengths=(1.0,))


def test_a_strategy_chooses_by_evidence_and_says_so(stream, caplog):
    caplog.set_level("INFO", logger="avalanche_curv")
    strategy = maker(epochs=2)(Evidence())
    strengths = []
    for experience in stream.train_stream[:3]:
        strategy.train(experience)
        strengths.append(strategy.strength)
    assert strategy.rule == Evidence()
    assert strengths[0] == 1.0
    assert all(0 < one < math.inf and one != 1.0 for one in strengths[1:])
    assert sum("by evidence" in record.message for record in caplog.records) == 2
