"""Which parameters of a model a selection takes, and which of them make up the space of a risk."""

import pytest
import torch
from torch import nn

from avalanche_curv import EmpiricalRisk, ParameterSpace
from avalanche_curv.core.risk.selection import Selection


def test_names_and_types_select_also_inside_of_wrappers():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    selection = Selection(include=("0", nn.LayerNorm), exclude=("*.bias",))
    assert [name for name, _ in selection.of(model)] == ["0.weight", "1.weight"]
    assert [name for name, _ in selection.of(nn.DataParallel(model))] == ["module.0.weight", "module.1.weight"]


def test_a_tied_parameter_is_selected_by_any_of_its_names():
    model = nn.ModuleDict({"table": nn.Embedding(3, 2), "out": nn.Linear(2, 3, bias=False)})
    model["out"].weight = model["table"].weight
    assert [name for name, _ in Selection().of(model)] == ["table.weight"]
    assert [name for name, _ in Selection(include=(nn.Linear,)).of(model)] == ["out.weight"]


def test_a_name_that_is_almost_right_is_suggested():
    model = nn.ModuleDict({"classifier": nn.Linear(2, 3)})
    with pytest.raises(ValueError, match=r"'clasifier' selects.*'classifier'"):
        Selection(include=("clasifier",)).check(model)
    with pytest.raises(ValueError, match="'LayerNorm' selects"):
        Selection(exclude=(nn.LayerNorm,)).check(model)


@pytest.fixture
def warmed_up():
    """A body that is frozen, and a head that trains."""
    model = nn.Sequential()
    model.add_module("body", nn.Linear(3, 2))
    model.add_module("norm", nn.LayerNorm(2))
    model.add_module("head", nn.Linear(2, 2))
    model.body.requires_grad_(False)
    return model


def snapshot(model, **selection):
    return EmpiricalRisk.snapshot(model, nn.MSELoss(), [(torch.ones(4, 3), torch.zeros(4, 2))], **selection)


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ({}, ["norm.weight", "norm.bias", "head.weight", "head.bias"]),
        ({"exclude": [nn.LayerNorm]}, ["head.weight", "head.bias"]),
        ({"include": ["body"]}, ["body.weight", "body.bias"]),
        ({"include": ["*"], "exclude": ["*.bias"]}, ["body.weight", "norm.weight", "head.weight"]),
    ],
)
def test_a_space_is_of_trainable_parameters_or_of_those_included_though_frozen(warmed_up, selection, names):
    risk = snapshot(warmed_up, **selection)
    assert list(risk.space.names) == names
    assert len(risk.parameters) == len(names)
    assert len(risk.anchor) == len(risk.gradient()) == risk.space.size
    assert not warmed_up.body.weight.requires_grad
    assert warmed_up.head.weight.requires_grad
    assert risk.frozen_at(warmed_up).space == risk.space  # with the same selection


def test_what_was_left_out_because_it_was_frozen_is_named(warmed_up):
    assert snapshot(warmed_up).frozen == ("body.weight", "body.bias")
    assert snapshot(warmed_up, exclude=["body.weight"]).frozen == ("body.bias",)
    assert snapshot(warmed_up, include=["head"]).frozen == ()  # left out on purpose


def test_a_risk_covers_further_parameters_of_its_frozen_model(warmed_up):
    risk = snapshot(warmed_up, exclude=["*.bias"])
    whole = risk.covering(["body.weight", "body.bias", "no.such"])
    assert set(whole.space.names) == {"body.weight", "body.bias", "norm.weight", "head.weight"}
    assert risk.covering(["head.weight", "no.such"]) is risk
    assert list(risk.space.names) == ["norm.weight", "head.weight"]  # as it was


def test_selections_that_leave_nothing_or_fit_nothing_are_refused(warmed_up):
    with pytest.raises(ValueError, match=r"'hed' selects. Did you mean one of \['head'"):
        snapshot(warmed_up, include=["hed"])
    with pytest.raises(ValueError, match=r"no trainable parameter.*name frozen ones with include"):
        snapshot(warmed_up, exclude=["*"])
    for no_list in ("head", nn.Linear, None, 3):
        with pytest.raises(TypeError, match="each take a list of names"):
            snapshot(warmed_up, include=no_list)


def test_parameters_of_size_0_are_no_coordinates():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 0), nn.Linear(0, 2))
    assert ParameterSpace.of(model).names == ("0.weight", "0.bias", "2.bias")
    assert snapshot(model, include=["*"]).space == snapshot(model).space == ParameterSpace.of(model)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ParameterSpace.of(nn.Linear(3, 0))
