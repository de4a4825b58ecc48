"""A model that is evaluated by another classifier than it is trained with is remembered as it is trained."""

import copy

import pytest
import torch
from avalanche.models import NCMClassifier, TrainEvalModel
from avalanche.training.plugins import CurrentDataNCMUpdate
from torch import nn

from avalanche_curv import CurvatureEWCPlugin, Diagonal, EmpiricalRisk, Fisher, estimate


def test_the_past_is_that_of_the_classifier_for_training(plane, learner, train, examples):
    feature, trained = nn.Sequential(nn.Linear(2, 5), nn.Tanh()), nn.Linear(5, 2)
    model = TrainEvalModel(feature, trained, NCMClassifier())
    plugin = CurvatureEWCPlugin(1.0)
    train(learner(model, CurrentDataNCMUpdate(), plugin), plane.train_stream[:1])
    plain = nn.Sequential(feature, trained)
    inputs, targets = examples(plane.train_stream[0])
    risk = EmpiricalRisk.snapshot(plain, nn.CrossEntropyLoss(), [(inputs, targets)])
    expected = estimate(Fisher(), Diagonal(), risk).curvature.values
    torch.testing.assert_close(plugin.past.model.curvature.values, expected)
    assert float(expected.max()) > 0


def test_one_inside_another_model_is_refused_before_training(plane, learner, net):
    model = nn.Sequential(TrainEvalModel(net[:2], net[2], NCMClassifier()), nn.Identity())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"holds a TrainEvalModel.* Let the TrainEvalModel be"):
        learner(model, CurvatureEWCPlugin(1.0)).train(plane.train_stream[0])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
