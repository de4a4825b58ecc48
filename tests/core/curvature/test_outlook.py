"""A kind with very many columns says how long it will take, and what takes one; an ordinary number says nothing."""

import warnings

import pytest
import torch
from torch import nn

from avalanche_curv import GGN, Dense, Diagonal, EmpiricalFisher, EmpiricalRisk, Fisher, Kronecker, estimate
from avalanche_curv.core.curvature import outlook


class Tokens(nn.Module):
    """Outputs [N, classes, T] of inputs [N, T, 1]."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(1, classes, bias=False)

    def forward(self, x):
        return self.head(x).transpose(1, 2)


def risk(classes, tokens=3, examples=2):
    torch.manual_seed(0)
    targets = torch.randint(classes, (examples, tokens))
    return EmpiricalRisk.snapshot(Tokens(classes), nn.CrossEntropyLoss(), [(torch.randn(examples, tokens, 1), targets)])


@pytest.fixture
def slow(monkeypatch):
    """Every pace is too slow."""
    monkeypatch.setattr(outlook, "KNOWN", 0.0)
    monkeypatch.setattr(outlook, "LONG", 0.0)


@pytest.mark.parametrize("structure", [Diagonal(), Kronecker(), Dense()], ids=str)
@pytest.mark.parametrize("kind", [Fisher(), GGN()], ids=str)
def test_very_many_columns_are_said_once_with_what_takes_one(kind, structure, slow):
    named = type(kind).__name__
    with pytest.warns(UserWarning, match="backward pass") as said:
        estimate(kind, structure, risk(401))
    (message,) = {str(warning.message) for warning in said}
    assert len(said) == 1
    assert message.startswith(named)
    assert "of Tokens will take about 0 minutes: each of 2 examples has 1,200 columns" in message
    assert "Fisher(samples=1)" in message
    assert "EmpiricalFisher()" in message
    assert said[0].filename == __file__


@pytest.mark.parametrize(("kind", "classes"), [(Fisher(), 334), (Fisher(samples=1), 401), (EmpiricalFisher(), 401)])
def test_as_many_columns_as_a_thousand_classes_have_are_not_spoken_of(kind, classes, slow):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(kind, Diagonal(), risk(classes))


def test_what_takes_less_than_ten_minutes_is_not_spoken_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(Fisher(), Diagonal(), risk(401))


@pytest.mark.parametrize(("pace", "said"), [(0.3, "12 minutes"), (2.0, "80 minutes"), (3600.0, "2,400 hours")])
def test_the_whole_is_foreseen_from_the_pace(pace, said, monkeypatch):
    clock = iter([0.0, 1200 * pace])
    monkeypatch.setattr(outlook, "perf_counter", lambda: next(clock))
    foreseen = outlook.Outlook(Fisher(), risk(401))
    with pytest.warns(UserWarning, match=f"will take about {said}:"):
        foreseen.took(2, 600, 1200)  # half of all, at so many seconds for a column of one example
