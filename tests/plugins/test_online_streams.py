"""Online streams, which give a task in parts: with task boundaries that are told, and hidden."""

import copy
import logging
from functools import partial

import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_continuous_linear_decay_stream, split_online_stream
from torch import nn

from avalanche_curv import (
    Accumulate,
    AdaptiveRefresh,
    CurvatureEWCPlugin,
    FromScratch,
    KeepTerms,
    Kronecker,
    Merge,
    OrthogonalProjectionPlugin,
    Policy,
    Refresh,
    fidelity_metrics,
    landscape_metrics,
    plasticity_metrics,
)

PER = 48  # examples of each task of the plane


@pytest.fixture
def small(plane, stream_of, examples):
    """The plane in float64."""
    return stream_of([(x.double(), y) for x, y in map(examples, plane.train_stream)])


def split(benchmark, size=20, told=False):
    return list(split_online_stream(benchmark.train_stream, size, access_task_boundaries=told, seed=0))


def fishers(model, inputs):
    """E_x E_{y ~ p} of the squares of ∂ log p(y | x) / ∂θ, by a loop over examples and labels."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x in inputs:
        logs = model(x[None]).log_softmax(1)[0]
        for log in logs:
            parts = torch.autograd.grad(log, list(model.parameters()), retain_graph=True)
            total = [t + log.exp().detach() * g.square() / len(inputs) for t, g in zip(total, parts)]
    return total


def looped(model, stream, examples, strength, ends, weigh):
    """Training of a loop that adds strength · Σ w ½ Σ F (θ − a)², with a term from each part at which `ends` is true,
    over the examples since the last, and the weight `weigh` of their number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    past, since = [], []
    for number, part in enumerate(stream):
        inputs, targets = examples(part)
        since.append(inputs)
        for x, y in zip(inputs.split(5), targets.split(5)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            for weight, fisher, anchor in past:
                moved = zip(fisher, model.parameters(), anchor)
                loss = loss + strength * weight * sum((f * (p - a) ** 2).sum() / 2 for f, p, a in moved)
            loss.backward()
            optimizer.step()
        if ends(number):
            seen = torch.cat(since)
            past.append((weigh(len(seen)), fishers(model, seen), [p.detach().clone() for p in model.parameters()]))
            since = []
    return model


@pytest.mark.parametrize("told", [True, False])
def test_an_online_stream_trains_as_an_explicit_loop(told, double, net, learner, train, small, examples, close):
    """Told, the past has a term of weight 1 for each task; hidden, one for each part, of as much as its examples."""
    stream = split(small, told=told)
    model, per = net.double(), 30
    ewc = CurvatureEWCPlugin(5.0, guard=None, examples_per_experience=per)
    reference = looped(
        copy.deepcopy(model), stream, examples, 5.0,
        ends=(lambda n: n % 3 == 2) if told else (lambda n: True), weigh=lambda n: 1.0 if told else n / per,
    )
    train(learner(model, ewc, train_mb_size=5), stream, shuffle=False)
    for ours, loops in zip(model.parameters(), reference.parameters()):
        close(ours, loops.detach())
    assert ewc.past.experiences == (3 if told else 9)


@pytest.mark.parametrize("size", [1, 7, 48])
def test_strength_means_the_same_however_a_task_is_cut(size, double, net, learner, train, small, close):
    """Without steps, the past of a task in parts is that of the whole task where that many examples are said to be
    one experience."""
    still = torch.optim.SGD(net.double().parameters(), lr=0.0)
    whole, cut = (CurvatureEWCPlugin(1.0, examples_per_experience=PER) for _ in range(2))
    train(learner(net, whole, optimizer=still), small.train_stream[:1])
    train(learner(net, cut, optimizer=still), split(small, size)[: -(-PER // size)])
    close(cut.past.model.curvature.dense(), whole.past.model.curvature.dense())
    assert cut.past.model.gradient is None or cut.past.model.gradient.abs().max() < 1e-15


def test_what_is_done_with_hidden_boundaries_is_said_once(net, learner, train, plane, caplog):
    with caplog.at_level(logging.INFO, "avalanche_curv"):
        train(learner(net, CurvatureEWCPlugin(1.0)), split(plane))
    assert [r.message for r in caplog.records if "hides where its tasks end" in r.message] == [
        "This online stream hides where its tasks end. Its parts are absorbed one by one and weigh by their examples, "
        "1000 of them as much as one experience (examples_per_experience)."
    ]


def test_an_unstable_penalty_is_warned_of_once_and_not_at_every_part(net, learner, train, plane, recwarn):
    stream = split(plane)[:5]
    train(learner(net, CurvatureEWCPlugin(1e6, examples_per_experience=20)), stream[:3])
    assert sum("diverges" in str(warning.message) for warning in recwarn) == 1


class Whole(Policy):
    def absorb(self, past, risk, curvature, structure):
        return Accumulate().absorb(past, risk, curvature, structure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": AdaptiveRefresh()}, "AdaptiveRefresh takes in whole experiences"),
        ({"policy": Refresh()}, "Refresh takes in whole experiences"),
        ({"policy": Whole()}, "Whole takes in whole experiences"),
        ({"policy": Merge()}, "single update"),
        ({"structure": Kronecker(KeepTerms())}, r"Take Kronecker\(\)"),
    ],
)
def test_what_cannot_take_parts_is_refused_before_the_first_step(options, message, net, learner, plane):
    before = copy.deepcopy(net.state_dict())
    strategy = learner(net, CurvatureEWCPlugin(1.0, **options))
    with pytest.raises((TypeError, ValueError), match=message):
        strategy.train(split(plane)[0])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    strategy.train(split(plane, told=True)[0])


def test_merge_takes_parts_of_several_updates_also_where_the_last_is_a_single_one(net, learner, train, plane):
    ewc = CurvatureEWCPlugin(1.0, policy=Merge(0.9))
    train(learner(net, ewc, train_mb_size=10), split(plane))
    assert ewc.past.experiences == 9


def test_a_projection_refuses_a_stream_that_hides_its_tasks(net, learner, plane):
    with pytest.raises(ValueError, match=r"hides where its tasks end.*access_task_boundaries=True"):
        learner(net, OrthogonalProjectionPlugin()).train(split(plane)[0])


def test_metrics_of_a_stream_that_hides_its_tasks_are_those_of_one_that_tells_them(make, learner, train, plane):
    """What is hidden from the learner is not hidden from metrics: one past experience a task, and not one a part."""
    logs = []
    for told in (False, True):
        net = make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))
        metrics = [
            *fidelity_metrics(every=2, fraction=0.2, stream=plane.test_stream),
            *landscape_metrics(every=4, fraction=0.2),
            *plasticity_metrics(every=4, from_scratch=FromScratch(partial(torch.optim.SGD, lr=0.1))),
        ]
        logs.append(train(learner(net, metrics=metrics), split(plane, told=told)).evaluator.get_all_metrics())
    hidden, told = ({n: v for n, v in log.items() if not n.split("/")[0].endswith(("_MB", "_Epoch"))} for log in logs)
    assert "fidelity/accumulate/kappa/experience_1" in hidden
    assert "fidelity/accumulate/kappa/experience_2" not in hidden
    assert hidden.keys() == told.keys()
    for name, (steps, values) in told.items():
        assert (steps, values) == hidden[name], name


def test_where_tasks_overlap_parts_are_taken_by_their_examples_and_metrics_refuse(net, learner, train, plane):
    def mixed():
        torch.manual_seed(0)
        return list(split_continuous_linear_decay_stream(plane.train_stream, 8, 2, beta=4, shuffle=True))

    ewc = CurvatureEWCPlugin(1.0)
    train(learner(net, ewc), mixed())
    assert ewc.past.experiences == 6
    with pytest.raises(ValueError, match=r"belong to no task.*Nothing was trained"):
        learner(net, metrics=fidelity_metrics()).train(mixed()[0])
