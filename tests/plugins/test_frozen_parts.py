"""A head that is warmed up on a frozen body, and a past to begin with."""

import warnings

import pytest
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import (
    Accumulate,
    CurvatureEWC,
    CurvatureEWCPlugin,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Fisher,
    OrthogonalProjection,
    OrthogonalProjectionPlugin,
    Past,
    Refresh,
    estimate,
    fidelity_metrics,
)
from avalanche_curv.core.fidelity.monitor import PastModels

STRENGTH = 3.0


class Seen(SupervisedPlugin):
    """The penalty of each step, beside the explicit one."""

    def __init__(self, ewc):
        super().__init__()
        self.ewc, self.penalties, self.explicit = ewc, [], lambda model: 0.0

    def before_update(self, strategy, **kwargs):
        if self.ewc.last_penalty is not None:
            self.penalties.append((float(self.ewc.last_penalty), self.explicit(strategy.model)))


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def fisher_diagonal(model, inputs):
    """(1/N) Σ_i Σ_c p_c (∇ log p_c)², one example and class after the other."""
    total = torch.zeros_like(weights(model))
    for x in inputs:
        logs = model(x[None])[0].log_softmax(0)
        for log in logs:
            score = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            total += log.exp().detach() * torch.cat([g.reshape(-1) for g in score]).square()
    return total / len(inputs)


def warmed_up(strategy, stream, net, at_the_end):
    """Trains the head on the first experience, then everything on the second."""
    net[0].requires_grad_(False)
    strategy.train(stream[0])
    net[0].requires_grad_(True)
    at_the_end()
    strategy.train(stream[1])


def test_a_body_that_is_included_though_frozen_is_protected_when_it_trains(net, learner, plane, examples):
    ewc = CurvatureEWCPlugin(STRENGTH, include=["*"])
    seen = Seen(ewc)

    def at_the_end():
        anchor, diagonal = weights(net), fisher_diagonal(net, examples(plane.train_stream[0])[0])
        seen.explicit = lambda model: float((diagonal * (weights(model) - anchor).square()).sum() / 2)

    strategy = learner(net, ewc, seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warmed_up(strategy, plane.train_stream, net, at_the_end)
    found, expected = torch.tensor(seen.penalties).unbind(1)
    assert len(found) >= 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert found[-1] > 1e-5


class Steps(SupervisedPlugin):
    """Counts optimiser steps."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def after_update(self, strategy, **kwargs):
        self.count += 1


@pytest.mark.parametrize("plugin", ["ewc", "projection"])
def test_a_body_that_trains_unprotected_is_said_before_its_first_step(plugin, net, learner, plane):
    steps = Steps()
    strategy = learner(net, steps, CurvatureEWCPlugin(1.0) if plugin == "ewc" else OrthogonalProjectionPlugin())
    net[0].requires_grad_(False)
    strategy.train(plane.train_stream[0])
    before = steps.count
    net[0].requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match=r"0\.weight, 0\.bias\. Absorb the past with include"):
            strategy.train(plane.train_stream[1])
    assert steps.count == before
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        strategy.train(plane.train_stream[1])  # said once


def test_a_projection_protects_a_body_that_is_included_though_frozen(net, learner, plane):
    plugin, anchor = OrthogonalProjectionPlugin(include=["*"]), {}
    warmed_up(
        learner(net, plugin), plane.train_stream, net,
        lambda: anchor.update({name: p.detach().clone() for name, p in net.named_parameters()}, first=plugin.protected),
    )
    first = anchor.pop("first")
    now = first.values(net)
    assert {*now} == {*anchor}
    assert not torch.equal(now["0.weight"], anchor["0.weight"])
    assert first.leakage(now, anchor) < 1e-4


def test_fidelity_sees_a_body_that_was_frozen(net, learner, plane, examples):
    """κ is that over all parameters which move; 0 would be what cannot be seen."""
    metrics, whole = fidelity_metrics(every=1, fraction=1.0), []

    def at_the_end():
        risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [examples(plane.train_stream[0])])
        whole.append(PastModels(Fisher()).with_experience(risk))

    body = torch.optim.SGD(net[0].parameters(), lr=0.1)
    strategy = learner(net, metrics=metrics, optimizer=body)
    warmed_up(strategy, plane.train_stream, net, at_the_end)
    expected = whole[0].measure(net)
    for name in ("accumulate/kappa_abs", "refresh/gamma", "accumulate/distance"):
        found = strategy.evaluator.get_last_metrics()[f"fidelity_experience/{name}"]
        assert found == pytest.approx(expected[name], rel=1e-4)
        assert found > 1e-4


def test_a_selection_is_checked_before_training(net, learner, plane):
    makers = {
        "ewc": lambda: {"plugins": [CurvatureEWCPlugin(1.0, include=["hed"])]},
        "projection": lambda: {"plugins": [OrthogonalProjectionPlugin(exclude=[nn.LayerNorm])]},
        "fidelity": lambda: {"metrics": fidelity_metrics(include=["hed"])},
    }
    for make in makers.values():
        options = make()
        steps = Steps()
        strategy = learner(net, steps, *options.get("plugins", ()), metrics=options.get("metrics", ()))
        with pytest.raises(ValueError, match=r"has no parameter that '(hed|LayerNorm)' selects. Did you mean"):
            strategy.train(plane.train_stream[0])
        assert steps.count == 0
    with pytest.raises(TypeError, match="each take a list"):
        CurvatureEWCPlugin(1.0, include="head")


def test_what_is_excluded_is_not_penalised(net, learner, plane):
    ewc = CurvatureEWCPlugin(1.0, exclude=["*.bias"])
    learner(net, ewc).train(plane.train_stream[0])
    assert ewc.past.model.space.names == ("0.weight", "2.weight")
    assert fidelity_metrics(of=ewc)[0].selection == ewc.selection


# A past to begin with


def pretrained(net, plane, examples, policy=Accumulate(), structure=Diagonal()):  # noqa: B008
    inputs, targets = examples(plane.train_stream[0])
    risk = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [(inputs, targets)])
    return policy.absorb(Past(), risk, Fisher(), structure)


def test_a_pretrained_past_is_protected_from_the_first_step_and_added_to(net, learner, plane, examples):
    past = pretrained(net, plane, examples)
    anchor, diagonal = weights(net), fisher_diagonal(net, examples(plane.train_stream[0])[0])
    ewc = CurvatureEWCPlugin(STRENGTH, past=past)
    seen = Seen(ewc)
    seen.explicit = lambda model: float((diagonal * (weights(model) - anchor).square()).sum() / 2)
    learner(net, seen, ewc).train(plane.train_stream[1])
    found, expected = torch.tensor(seen.penalties).unbind(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert ewc.past.experiences == 2
    second = EmpiricalRisk.snapshot(net, nn.CrossEntropyLoss(), [examples(plane.train_stream[1])])
    both = past.model + estimate(Fisher(), Diagonal(), second)
    torch.testing.assert_close(ewc.past.model.curvature.dense(), both.curvature.dense())


def test_strategies_pass_the_past_and_the_selection_on(net, plane, examples):
    past, optimizer = pretrained(net, plane, examples), torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"model": net, "optimizer": optimizer, "include": ["2"], "exclude": ["*.bias"]}
    ewc = CurvatureEWC(strength=1.0, past=past, **options).ewc
    assert ewc.past is past
    selection = OrthogonalProjection(**options).projection.selection
    assert (selection.include, selection.exclude) == (("2",), ("*.bias",))
    assert ewc.selection == selection


def test_a_past_that_does_not_fit_is_refused_before_training(net, make, learner, plane, examples):
    past = pretrained(net, plane, examples)
    with pytest.raises(TypeError, match=r"past must be a Past; got .*QuadraticModel"):
        CurvatureEWCPlugin(1.0, past=past.model)
    with pytest.raises(ValueError, match=r"Refresh\(\) .* stores those of 0 of its 1 experiences"):
        CurvatureEWCPlugin(1.0, past=past, policy=Refresh())
    narrow = make(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
    deeper = make(lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 5), nn.Tanh()), nn.Linear(5, 2)))
    for model, message in ((narrow, r"had shape \(5, 2\) at the anchor and has \(4, 2\)"), (deeper, "is not in the")):
        steps = Steps()
        with pytest.raises(ValueError, match=message):
            learner(model, CurvatureEWCPlugin(1.0, past=past), steps).train(plane.train_stream[0])
        assert steps.count == 0


@pytest.mark.parametrize("structure", [Diagonal(), Dense()])
def test_the_past_follows_a_model_that_becomes_double(structure, net, learner, plane, examples, stream_of):
    """The penalty in float64 is that of the float32 past, to the digits of float64."""
    past = pretrained(net, plane, examples, structure=structure)
    ewc = CurvatureEWCPlugin(STRENGTH, past=past, structure=structure)
    seen = Seen(ewc)
    anchor, c = weights(net).double(), past.model.curvature.dense().double()

    def explicit(model):
        d = weights(model) - anchor
        return float(d @ c @ d / 2)

    seen.explicit = explicit
    inputs, targets = examples(plane.train_stream[1])
    learner(net.double(), seen, ewc).train(stream_of([(inputs.double(), targets)]).train_stream[0])
    found, expected = torch.tensor(seen.penalties, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert ewc.past.model.anchor.dtype == torch.float64
