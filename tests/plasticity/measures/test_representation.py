import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv.plasticity.measures import (
    dormancy_scores,
    hidden_activations,
    representation_change,
    representations,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolutional():
    """Two hidden layers of channels and one of features."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.Tanh(),
        nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2),
    )  # fmt: skip


IMAGES = drawn(6, 1, 8, 8)


# --- which activations ---


def test_outputs_of_activation_modules_are_taken_with_the_units_last(make_model):
    model = make_model(convolutional)
    with torch.no_grad():
        first = F.relu(F.conv2d(IMAGES, model[0].weight, model[0].bias))
        second = torch.tanh(F.conv2d(F.max_pool2d(first, 2), model[3].weight, model[3].bias))
        third = F.relu(F.linear(second.flatten(1), model[6].weight, model[6].bias))
    found = hidden_activations(model, IMAGES)
    expected = {"1": first.movedim(1, -1), "4": second.movedim(1, -1), "7": third}
    assert list(found) == list(expected)
    for name, h in expected.items():
        torch.testing.assert_close(found[name], h, rtol=0, atol=1e-14)


def test_of_functions_the_inputs_of_the_next_layers_are_taken(make_model, written):
    def forward(self, x):
        h = torch.tanh(self.second(F.max_pool2d(F.relu(self.first(x)), 2))).flatten(1)
        return self.head(F.relu(self.third(h)))

    modules = make_model(convolutional).eval()
    functions = written(forward, first=modules[0], second=modules[3], third=modules[6], head=modules[9])
    found = hidden_activations(functions, IMAGES)
    assert list(found) == ["second", "third", "head"]
    with torch.no_grad():
        pooled, flat, last = modules[:3](IMAGES), modules[:6](IMAGES), modules[:8](IMAGES)
    torch.testing.assert_close(found["second"], pooled.movedim(1, -1))
    torch.testing.assert_close(found["third"], flat)
    torch.testing.assert_close(found["head"], last)


def test_tokens_have_their_features_last_and_images_with_channels_last_too(make_model, written):
    layers = {"conv": nn.Conv2d(1, 4, 3), "up": nn.Linear(4, 7), "gelu": nn.GELU(), "down": nn.Linear(7, 2)}
    model = written(lambda self, x: self.down(self.gelu(self.up(self.conv(x).movedim(1, -1)))).mean((1, 2)), **layers)
    assert hidden_activations(model.double(), IMAGES)["gelu"].shape == (6, 6, 6, 7)


def test_a_module_that_is_called_twice_counts_twice(written):
    model = written(lambda self, x: self.b(self.relu(self.b(self.relu(self.a(x))))).sum(1, keepdim=True),
                    a=nn.Linear(3, 4), b=nn.Linear(4, 4), relu=nn.ReLU())  # fmt: skip
    found = hidden_activations(model.double(), drawn(5, 3))
    assert list(found) == ["relu", "relu[1]"]
    assert not torch.equal(found["relu"], found["relu[1]"])


def test_what_is_written_over_later_is_taken_as_it_was_and_outputs_are_not_hidden(make_model):
    model = make_model(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.ReLU(inplace=True), nn.Linear(4, 2),
                                             nn.Sigmoid()))  # fmt: skip
    found = hidden_activations(model, drawn(5, 3))
    assert list(found) == ["1", "2"]  # what gives the outputs is not hidden
    assert (found["1"] < 0).any()
    assert torch.equal(found["2"], found["1"].relu())


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Sigmoid())])
def test_a_model_without_hidden_layers_is_refused_with_a_remedy(model):
    with pytest.raises(ValueError, match=r"no hidden activations: .* Use modules such as nn.ReLU\(\)"):
        hidden_activations(model.double(), drawn(5, 3))


def test_the_model_is_left_as_it_was(make_model):
    model = make_model(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 1))
    )
    model[1].eval()
    inputs = drawn(5, 3)
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    first, again = hidden_activations(model, inputs), hidden_activations(model, inputs)
    assert torch.equal(first["2"], again["2"])
    assert not first["2"].requires_grad
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_single(dtype, make_model):
    model = make_model(convolutional).to(dtype)
    expected = hidden_activations(model.float(), IMAGES.float())
    found = hidden_activations(model.to(dtype), IMAGES.to(dtype))
    for name, h in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], h, rtol=0.05, atol=0.05)


# --- dormant units ---


def test_scores_and_ranks_are_those_of_their_definitions(make_model):
    activations = hidden_activations(make_model(convolutional), drawn(6, 1, 8, 8, seed=3))
    for name, one in representations(activations, threshold=0.6).items():
        h = activations[name].numpy()
        strength = [np.mean(abs(h[..., i])) for i in range(h.shape[-1])]
        scores = [s / (sum(strength) / len(strength)) for s in strength]
        np.testing.assert_allclose(dormancy_scores(activations[name]).numpy(), scores, rtol=1e-12)
        assert one.units == len(scores)
        assert one.dormant == sum(s <= 0.6 for s in scores) / len(scores)
        assert one.zero == sum(s == 0 for s in strength) / len(scores)
        values = np.linalg.svd(h.reshape(6, -1), compute_uv=False)
        p = values[values > 0] / values.sum()
        assert one.effective_rank == pytest.approx(np.prod(p**-p))
        assert one.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2)


def test_units_that_are_cut_off_are_zero_and_dormant(make_model):
    model = make_model(convolutional)
    with torch.no_grad():
        model[0].bias[1] = -1e9  # a channel
        model[6].bias.copy_(torch.tensor([-1e9, -1e9, 9, 9, 9]))  # two features
    found = representations(hidden_activations(model, IMAGES), threshold=0)
    assert [one.zero for one in found.values()] == [0.25, 0, 0.4]
    assert [one.dormant for one in found.values()] == [0.25, 0, 0.4]


NAN = math.nan


@pytest.mark.parametrize(
    ("rows", "threshold", "expected"),
    [
        ([[1.0, 1.0, 0.0], [1.0, 1.0, 0.06]], 0.05, {"dormant": 1 / 3, "zero": 0}),  # means 1, 1 and 0.03:
        ([[1.0, 1.0, 0.0], [1.0, 1.0, 0.06]], 0.04, {"dormant": 0}),  # the score is 0.03 / (2.03 / 3) = 0.0443
        ([[1.0, -1.0], [-1.0, 1.0]], 0.99, {"dormant": 0, "zero": 0}),  # signs do not cancel
        (4 * [[0.0, 0.0, 0.0]], 0, {"dormant": 1, "zero": 1, "effective_rank": 0, "stable_rank": 0}),
        ([[1.0, NAN], [0, 0]], 0, {"units": 2, "dormant": NAN, "zero": NAN, "effective_rank": NAN, "stable_rank": NAN}),
    ],
)
def test_layers_on_paper(rows, threshold, expected):
    found = vars(representations({"h": torch.tensor(rows)}, threshold)["h"])
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, "0.1"])
def test_an_unusable_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number, at least 0"):
        representations({}, threshold)


# --- change ---


def test_change_is_the_mean_over_layers_of_relative_distances_whatever_their_scale():
    before = {"a": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.ones(2, 2, 1)}
    now = {"a": torch.tensor([[3.0, 3.0], [4.0, 4.0]]), "b": 3 * torch.ones(2, 2, 1)}
    assert representation_change(before, now) == pytest.approx((5 / 5 + 2) / 2)
    assert representation_change(before, before) == 0
    scaled = [{"a": 7 * one["a"], "b": one["b"]} for one in (before, now)]
    assert representation_change(*scaled) == pytest.approx(1.5)
    zeros = {"a": torch.zeros(2, 2)}
    assert representation_change(zeros, zeros) == 0
    assert representation_change(zeros, {"a": torch.ones(2, 2)}) == math.inf


def test_layers_that_came_went_or_grew_do_not_count():
    before = {"a": torch.ones(2, 2), "gone": torch.ones(2, 1), "grown": torch.ones(2, 3)}
    now = {"a": 2 * torch.ones(2, 2), "new": torch.ones(2, 1), "grown": torch.ones(2, 4)}
    assert representation_change(before, now) == 1
    assert math.isnan(representation_change({"gone": torch.ones(2, 1)}, now))
    assert math.isnan(representation_change({"a": torch.ones(2, 2)}, {"a": torch.full((2, 2), math.nan)}))
