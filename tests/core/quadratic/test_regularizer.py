"""The penalty of the past in any training loop: attached to optimisers it trains the same as in the loss."""

import copy
import gc
import io
import logging
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    GGN,
    AbsoluteError,
    Accumulate,
    AdaptiveRefresh,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    Fisher,
    Hessian,
    KeepTerms,
    Kronecker,
    MatrixFree,
    Merge,
    NonFiniteCurvatureError,
    Past,
    Refresh,
    RescaleIfUnstable,
    StopIfUnstable,
    UnstablePenaltyError,
    suggest_strength,
)
from avalanche_curv.core.quadratic import kept
from avalanche_curv.core.quadratic.penalty import Penalty
from avalanche_curv.core.structures import Structure

STEPS, STRENGTH = 7, 3.0


def batches_of(task, size=10):
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    return list(zip(x.split(size), (x.sum(1) > 0).long().add(task % 2).split(size)))


@pytest.fixture
def model(make):
    return make(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()


def fresh(strength=STRENGTH, structure=Dense(), **options):  # noqa: B008  a frozen value
    return CurvatureRegularizer(strength, structure=structure, **{"guard": None, **options})


def with_past(model, tasks=2, **options):
    """A regulariser that knows tasks which ended at other parameters than those of `model`."""
    regularizer, before = fresh(**options), copy.deepcopy(model)
    for task in range(tasks):
        with torch.no_grad():
            for parameter in before.parameters():
                parameter.mul_(0.9)
        regularizer.absorb(before, nn.CrossEntropyLoss(), batches_of(task))
    return regularizer


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain(model, optimizers, penalty=None):
    """A few steps on the third task, with the penalty in the loss where one is given."""
    for _, (x, y) in zip(range(STEPS), 3 * batches_of(2)):
        loss = cross_entropy(model(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss if penalty is None else loss + penalty(model, *optimizers)).backward()
        for optimizer in optimizers:
            optimizer.step()


def added(model, optimizers_of, regularizer, train=plain):
    """The weights after training with the penalty in the loss."""
    model, regularizer = copy.deepcopy((model, regularizer))
    train(model, optimizers_of(model), regularizer.penalty)
    return weights(model)


def beside(model, optimizers_of, regularizer):
    """The weights after training with the penalty's gradient added after each backward pass."""
    model, regularizer = copy.deepcopy((model, regularizer))
    optimizers = optimizers_of(model)
    for _, (x, y) in zip(range(STEPS), 3 * batches_of(2)):
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        value = regularizer.add(model, *optimizers)
        assert float(value) == pytest.approx(STRENGTH * float(regularizer.past.model(model)), rel=1e-10)
        assert float(regularizer.last_penalty) == pytest.approx(float(value) / STRENGTH, rel=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    return weights(model)


def attached(model, optimizers_of, regularizer, train=plain):
    """The weights after training with the penalty attached to each optimiser."""
    model, regularizer = copy.deepcopy((model, regularizer))
    optimizers = optimizers_of(model)
    for optimizer in optimizers:
        regularizer.attach(optimizer, model)
    train(model, optimizers)
    return weights(model)


def one(kind, **options):
    return lambda model: [kind(model.parameters(), **options)]


def groups(model):
    return [torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.01)]


def layers(model):
    return [torch.optim.SGD(model[2].parameters(), lr=0.1), torch.optim.Adam(model[0].parameters(), lr=0.01)]


@pytest.mark.parametrize("structure", [Dense(), Diagonal(), Kronecker()])
@pytest.mark.parametrize(
    "optimizers_of",
    [
        one(torch.optim.SGD, lr=0.1), one(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        one(torch.optim.Adam, lr=0.01), one(torch.optim.AdamW, lr=0.01, amsgrad=True), groups, layers,
        lambda model: layers(model)[:1],  # the other layer is stepped by none
    ],
    ids=["sgd", "momentum", "adam", "adamw", "groups", "two optimizers", "one of two layers"],
)  # fmt: skip
def test_attached_beside_the_loss_and_added_to_it_train_equal_weights(structure, optimizers_of, model):
    regularizer = with_past(model, structure=structure)
    found = attached(model, optimizers_of, regularizer)
    assert torch.equal(found, added(model, optimizers_of, regularizer))
    assert torch.equal(found, beside(model, optimizers_of, regularizer))
    without = copy.deepcopy(model)
    plain(without, optimizers_of(without))
    assert (found - weights(without)).abs().max() > 1e-3


def test_a_wrapped_model_is_that_in_the_wrapper(model):
    def wrapped(train):
        return lambda model, optimizers, penalty=None: train(nn.DataParallel(model), optimizers, penalty)

    regularizer, optimizers_of = with_past(model), one(torch.optim.SGD, lr=0.1)
    whole = copy.deepcopy(model)
    (optimizer,) = optimizers_of(whole)
    data_parallel = nn.DataParallel(whole)
    with copy.deepcopy(regularizer).attach(optimizer, data_parallel):
        plain(data_parallel, [optimizer])
    assert torch.equal(weights(whole), added(model, optimizers_of, regularizer, wrapped(plain)))
    assert torch.equal(weights(whole), attached(model, optimizers_of, regularizer))


def test_the_gradient_added_is_that_of_the_quadratic_written_out(model):
    regularizer = with_past(model)
    past, optimizer = regularizer.past.model, torch.optim.SGD(model.parameters(), lr=1.0)
    before = weights(model)
    delta = before - past.anchor
    slope = past.curvature.dense() @ delta + past.gradient
    with regularizer.attach(optimizer, model):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(weights(model), before - STRENGTH * slope, rtol=1e-12, atol=1e-12)
    value = 0.5 * delta @ past.curvature.dense() @ delta + past.gradient @ delta + past.constant
    torch.testing.assert_close(regularizer.last_penalty, value, rtol=1e-12, atol=1e-12)
    assert regularizer.weight == STRENGTH
    plain(model, [optimizer])  # no longer attached
    assert regularizer.last_penalty == pytest.approx(float(value))


def test_accumulated_gradients_get_the_penalty_once_a_step(model):
    def accumulate(model, optimizers, penalty=None):
        (optimizer,) = optimizers
        for _ in range(STEPS):
            optimizer.zero_grad()
            for x, y in batches_of(2):
                (cross_entropy(model(x), y) / 3).backward()
            if penalty is not None:
                penalty(model).backward()
            optimizer.step()

    ways = one(torch.optim.Adam, lr=0.01), with_past(model), accumulate
    assert torch.equal(attached(model, *ways), added(model, *ways))


def scaled(model, optimizers, penalty=None):
    """With a gradient scaler that unscales before it clips, and a loss that is infinite once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for number, (x, y) in zip(range(STEPS), 3 * batches_of(2)):
        loss = cross_entropy(model(x), y) * (float("inf") if number == 4 else 1.0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss if penalty is None else loss + penalty(model, *optimizers)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize(
    "optimizers_of",
    [one(torch.optim.SGD, lr=0.1), one(torch.optim.Adam, lr=0.01, fused=True), one(torch.optim.SGD, lr=0.1, fused=True),
     layers],
    ids=["unscaled", "fused Adam", "fused SGD", "two optimizers"],
)  # fmt: skip
def test_a_gradient_scaler_scales_the_penalty_as_the_gradients(optimizers_of, model):
    ways = optimizers_of, with_past(model), scaled
    found = attached(model, *ways)
    assert torch.equal(found, added(model, *ways))
    assert found.isfinite().all()


def test_what_clips_gradients_sees_the_task_alone_unless_the_penalty_is_in_the_loss(model):
    regularizer, optimizer = with_past(model, strength=1e3), torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = batches_of(2)[0]
    cross_entropy(model(x), y).backward()
    with regularizer.attach(optimizer, model):
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) < 2
        optimizer.step()
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() > 50
    optimizer.zero_grad()
    (cross_entropy(model(x), y) + regularizer.penalty(model)).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 50


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_sees_the_penalty_in_each_evaluation_of_its_closure(search, model):
    def closed(model, optimizers, penalty=None):
        (optimizer,) = optimizers
        x, y = batches_of(2, size=30)[0]

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss = loss if penalty is None else loss + penalty(model)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(3)])

    losses, regularizer = [], with_past(model)
    ways = one(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn=search), regularizer, closed
    torch.testing.assert_close(attached(model, *ways), added(model, *ways), rtol=0, atol=1e-12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][-1] < losses[0][0]


def test_updates_are_counted_once_for_all_evaluations_of_a_closure_and_all_optimizers(model):
    def updates(regularizer):
        return regularizer.state_dict()["fields"]["updates"]

    regularizer, lbfgs = with_past(model, strength=1e-2), torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x, y = batches_of(2)[0]

    def closure():
        lbfgs.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    with regularizer.attach(lbfgs, model):
        for _ in range(2):
            lbfgs.step(closure)
    assert updates(regularizer) == 2
    head, body = layers(model)
    for optimizer in (head, body):
        regularizer.attach(optimizer, model)
    plain(model, [head, body])
    assert updates(regularizer) == 2 + STEPS
    plain(model, [head])  # of whose steps the last one waits for the other optimiser
    assert updates(regularizer) == 2 + STEPS + STEPS - 1
    resumed = fresh()
    resumed.load_state_dict(regularizer.state_dict())
    resumed.attach(head, model)
    plain(model, [head])
    assert updates(resumed) == 2 + STEPS + STEPS + STEPS


def test_a_closure_that_returns_nothing_trains_as_the_step_after_it(model):
    def closed(model, optimizers, penalty=None):
        (optimizer,) = optimizers

        def closure(batch):
            optimizer.zero_grad()
            cross_entropy(model(batch[0]), batch[1]).backward()

        for _, batch in zip(range(STEPS), 3 * batches_of(2)):
            assert optimizer.step(closure=lambda: closure(batch)) is None  # noqa: B023

    ways = one(torch.optim.Adam, lr=0.01), with_past(model)
    assert torch.equal(attached(model, *ways, closed), attached(model, *ways))


def test_of_two_optimizers_the_first_evaluates_for_both_unless_gradients_are_new(model, monkeypatch):
    calls, gradients = [], Penalty.gradients
    monkeypatch.setattr(Penalty, "gradients", lambda *args: calls.append(1) or gradients(*args))
    regularizer = with_past(model)
    attached(model, layers, regularizer)
    assert len(calls) == STEPS


@pytest.mark.parametrize("to_none", [True, False])
def test_two_optimizers_that_take_turns_each_see_the_penalty_where_they_step(to_none, model):
    """Gradients that are zeroed in place stay the same tensors."""

    def alternating(model, optimizers, penalty=None):
        for number, (x, y) in zip(range(2 * STEPS), 6 * batches_of(2)):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=to_none)
            loss = cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty(model)).backward()
            optimizers[number % 2].step()

    ways = layers, with_past(model), alternating
    assert torch.equal(attached(model, *ways), added(model, *ways))


def test_gradients_that_are_clipped_between_two_optimizers_are_still_of_one_backward_pass(model):
    def clipped(model, optimizers, penalty=None):
        for _, (x, y) in zip(range(STEPS), 3 * batches_of(2)):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=False)
            loss = cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty(model)).backward()
            for optimizer in optimizers:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e9)
                optimizer.step()
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())

    ways = layers, with_past(model), clipped
    assert torch.equal(attached(model, *ways), added(model, *ways))


def test_a_second_optimizer_of_the_same_parameters_takes_the_place_of_the_first(model):
    regularizer, (head, body) = with_past(model), layers(model)
    first, other = regularizer.attach(head, model), regularizer.attach(body, model)
    newer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    later = regularizer.attach(newer, model)
    assert regularizer._attached.attachments == [other, later]
    first.remove()
    before = model[2].weight.detach().clone()
    model[2].weight.grad = torch.zeros_like(before)
    newer.step()
    assert not torch.equal(before, model[2].weight)
    other.remove()
    later.remove()
    assert regularizer.attach(torch.optim.SGD(model.parameters()), model)


class Heads(nn.Module):
    """Outputs of the head in use."""

    def __init__(self):
        super().__init__()
        self.body, self.heads, self.task = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]), 0

    def forward(self, x):
        return self.heads[self.task](self.body(x).tanh())


def test_a_parameter_without_a_gradient_gets_that_of_the_penalty(make):
    model = make(Heads).double()
    regularizer = with_past(model)
    model.task = 1
    ways = one(torch.optim.SGD, lr=0.1), regularizer
    assert torch.equal(attached(model, *ways), added(model, *ways))
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), weights(model)
    with regularizer.attach(optimizer, model):
        optimizer.step()  # without any gradient
    assert torch.equal(weights(model), before)
    assert torch.equal(beside(model, *ways), added(model, *ways))
    model.heads[0].requires_grad_(False)
    assert torch.equal(attached(model, *ways), added(model, *ways))
    assert torch.equal(beside(model, *ways), added(model, *ways))


def test_parameters_that_come_later_to_an_optimizer_or_grow_have_their_part(model):
    regularizer = with_past(model)
    grown = copy.deepcopy(model)
    grown[2] = nn.Linear(5, 4).double()
    with torch.no_grad():
        grown[2].weight[:3], grown[2].bias[:3] = model[2].weight, model[2].bias

    def late(model, optimizers, penalty=None):
        optimizers[0].add_param_group({"params": model[2].parameters()})
        plain(model, optimizers, penalty)

    ways = lambda model: [torch.optim.Adam(model[0].parameters(), lr=0.01)], regularizer, late
    assert torch.equal(attached(grown, *ways), added(grown, *ways))


def test_sparse_gradients_become_dense(make):
    model = make(lambda: nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Flatten(), nn.Linear(6, 3))).double()
    regularizer, tokens = fresh(), torch.arange(12).view(6, 2) % 5
    regularizer.absorb(model, nn.CrossEntropyLoss(), [(tokens, torch.arange(6) % 3)])

    def train(model, optimizers, penalty=None):
        for _ in range(3):
            optimizers[0].zero_grad()
            loss = cross_entropy(model(tokens), torch.arange(6) % 2)
            (loss if penalty is None else loss + penalty(model)).backward()
            optimizers[0].step()

    ways = one(torch.optim.SGD, lr=0.1), regularizer, train
    torch.testing.assert_close(attached(model, *ways), added(model, *ways), rtol=0, atol=1e-14)


@pytest.mark.parametrize("optimizers_of", [one(torch.optim.Adam, lr=0.01), layers])
def test_strength_0_trains_as_without_and_measures(optimizers_of, model):
    regularizer, without = with_past(model, strength=0), copy.deepcopy(model)
    plain(without, optimizers_of(without))
    for way in (attached, added):
        assert torch.equal(way(model, optimizers_of, regularizer), weights(without))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with regularizer.attach(optimizer, model):
        plain(model, [optimizer])
        assert regularizer.last_penalty > 0
        regularizer.strength = 2.0  # from the next step on
        plain(model, [optimizer])
        assert regularizer.weight == 2
    assert fresh().penalty(model) == 0
    assert fresh().add(model) is None


ADAPTIVE = AdaptiveRefresh(trust=AbsoluteError(1e-4), fraction=0.5, every=2)
EVENTS = [event for task in range(4) for event in (*2 * [(task, batch) for batch in batches_of(task)], (task, None))]


def grown(model):
    """The model with one more output."""
    old, model[2] = model[2], nn.Linear(5, 4).double()
    with torch.no_grad():
        for new, before in zip(model[2].parameters(), old.parameters()):
            new.fill_(0.1)[:3] = before
    return model


def follow(events, model, optimizers, regularizer):
    """Steps on the batches of tasks, each of which is absorbed at its end."""
    for task, batch in events:
        if batch is None:
            regularizer.absorb(model, nn.CrossEntropyLoss(), batches_of(task))
            continue
        for optimizer in optimizers:
            optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("policy", [Accumulate(), Merge(0.5), Refresh(0.5, gradient=True), ADAPTIVE], ids=type)
@pytest.mark.parametrize("stop", [21, 24], ids=["between tasks", "in a task"])
def test_a_resumed_run_ends_bit_identically(policy, stop, model):
    """What the guard decided at a rate in a task holds in it at lower ones, which would not decide so again."""

    def schedule(optimizers):
        if stop == 24 and policy is not ADAPTIVE:  # which estimates anew in a task
            optimizers[0].param_groups[0]["lr"] /= 1e4

    def begun(parts=None):
        learner = copy.deepcopy(model)
        regularizer = fresh(100.0, Diagonal(), policy=policy, guard=RescaleIfUnstable(0.1))
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.3, momentum=0.9)
        if parts is not None:
            learner.load_state_dict(parts["model"])
            optimizer.load_state_dict(parts["optimizer"])
            regularizer.load_state_dict(parts["regularizer"], model=learner, criterion=nn.CrossEntropyLoss())
        regularizer.attach(optimizer, learner)
        return learner, [optimizer], regularizer

    whole = begun()
    follow(EVENTS[:stop], *whole)
    schedule(whole[1])
    follow(EVENTS[stop:], *whole)
    stopped, (optimizer,), regularizer = begun()
    follow(EVENTS[:stop], stopped, [optimizer], regularizer)
    schedule([optimizer])
    file = io.BytesIO()
    parts = {"model": stopped, "optimizer": optimizer, "regularizer": regularizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    resumed = begun(torch.load(file, weights_only=True))
    follow(EVENTS[stop:], *resumed)
    assert torch.equal(weights(whole[0]), weights(resumed[0]))
    assert whole[2].weight == resumed[2].weight < 100
    assert whole[2].past.refreshes == resumed[2].past.refreshes
    assert torch.equal(whole[2].past.model.anchor, resumed[2].past.model.anchor)


@pytest.mark.parametrize("first", ["model", "regularizer", "attach"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_frozen_body_is_resumed_in_any_order(first, seed):
    """`seed` makes the model that is loaded into: with the frozen values of before, or with others."""

    def begun(seed=0):
        torch.manual_seed(seed)
        learner = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 3)).double()
        return learner, torch.optim.SGD(learner[2:].parameters(), lr=0.3), fresh(10.0, Diagonal(), policy=ADAPTIVE)

    whole, optimizer, regularizer = begun()
    regularizer.attach(optimizer, whole)
    follow(EVENTS[:21], whole, [optimizer], regularizer)
    saved = copy.deepcopy({"model": whole.state_dict(), "regularizer": regularizer.state_dict()})
    resumed, other, loaded = begun(seed)
    loads = {
        "model": lambda: resumed.load_state_dict(saved["model"]),
        "regularizer": lambda: loaded.load_state_dict(
            saved["regularizer"], model=resumed, criterion=nn.CrossEntropyLoss()
        ),
        "attach": lambda: loaded.attach(other, resumed),
    }
    for name in (first, *(name for name in ("regularizer", "model", "attach") if name != first)):
        loads[name]()
    follow(EVENTS[21:], whole, [optimizer], regularizer)
    follow(EVENTS[21:], resumed, [other], loaded)
    assert torch.equal(weights(whole), weights(resumed))
    assert regularizer.past.refreshes == loaded.past.refreshes != ()


@pytest.mark.parametrize("optimizers_of", [one(torch.optim.SGD, lr=0.1), layers])
def test_the_policy_revises_after_each_step_of_all_optimizers(optimizers_of, model, caplog):
    """And before the first step of a task, for which the model has grown."""
    explicit, regularizer = copy.deepcopy(model), fresh(1.0, policy=ADAPTIVE)
    with caplog.at_level(logging.INFO, logger="avalanche_curv"):
        for task in range(4):
            optimizers = optimizers_of(grown(model) if task == 2 else model)
            attachments = [regularizer.attach(optimizer, model) for optimizer in optimizers]
            follow([event for event in EVENTS if event[0] == task], model, optimizers, regularizer)
            for attachment in attachments:
                attachment.remove()
    past = Past()
    for task in range(4):
        optimizers = optimizers_of(grown(explicit) if task == 2 else explicit)
        past = ADAPTIVE.revise(past, explicit, 0, Fisher(), Dense())
        for number, (x, y) in enumerate(2 * batches_of(task)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = cross_entropy(explicit(x), y)
            (loss if past.model is None else loss + past.model.penalty(explicit)).backward()
            for optimizer in optimizers:
                optimizer.step()
            past = ADAPTIVE.revise(past, explicit, number + 1, Fisher(), Dense())
        risk = fresh()._risk(explicit, nn.CrossEntropyLoss(), batches_of(task), {})
        past = ADAPTIVE.absorb(past, risk, Fisher(), Dense())
    torch.testing.assert_close(weights(model), weights(explicit), rtol=0, atol=1e-12)
    found = [(event.experience, event.iteration) for event in regularizer.past.refreshes]
    assert found == [(event.experience, event.iteration) for event in past.refreshes]
    assert len(found) == sum("Refresh in experience" in text for text in caplog.messages) > 1
    assert (2, 0) in found


def test_parts_of_a_task_weigh_by_their_share(model):
    whole, parts = fresh(curvature=GGN()), fresh(curvature=GGN())
    whole.absorb(model, nn.CrossEntropyLoss(), batches_of(0))
    for batch in batches_of(0):
        parts.absorb_part(model, nn.CrossEntropyLoss(), [batch], share=1 / 3)
    torch.testing.assert_close(whole.past.model.curvature.dense(), parts.past.model.curvature.dense())
    with pytest.raises(TypeError, match=r"Refresh takes in whole experiences"):
        fresh(policy=Refresh()).absorb_part(model, nn.CrossEntropyLoss(), batches_of(0), share=0.5)
    with pytest.raises(ValueError, match="share must be a finite number, above 0"):
        parts.absorb_part(model, nn.CrossEntropyLoss(), batches_of(0), share=0)


def test_absorbing_leaves_no_trace_in_the_loop(model):
    x, y = zip(*batches_of(0))
    data = torch.utils.data.TensorDataset(torch.cat(x), torch.cat(y))
    loader, state = torch.utils.data.DataLoader(data, batch_size=7, shuffle=True), torch.get_rng_state()
    before, model[0].weight.grad = weights(model), torch.ones(5, 4).double()
    regularizer = fresh()
    regularizer.check(model, nn.CrossEntropyLoss(), loader)
    assert regularizer.past == Past()
    regularizer.absorb(model.train(), nn.CrossEntropyLoss(), loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(model), before)
    assert model.training
    assert (model[0].weight.grad == 1).all()


@pytest.mark.parametrize("structure", [Diagonal(), Dense()], ids=str)
def test_what_steps_were_made_with_is_given_back_when_a_task_is_absorbed(structure, model):
    regularizer = with_past(model, structure=structure)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer, model)
    plain(model, [optimizer])
    before = weakref.ref(regularizer.past.model)
    regularizer.absorb(model, nn.CrossEntropyLoss(), batches_of(3))
    gc.collect()
    assert before() is None
    assert regularizer.last_penalty > 0


def test_the_guard_sees_the_rates_of_all_optimizers(model):
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    (alone,) = one(torch.optim.SGD, lr=0.1)(model)
    regularizer = with_past(model, strength=1e4, guard=RescaleIfUnstable(1.0))
    for optimizer in optimizers:
        regularizer.attach(optimizer, model)
    plain(model, optimizers)
    together = with_past(model, strength=1e4, guard=RescaleIfUnstable(1.0))
    together.past = regularizer.past
    together.penalty(model, alone)
    assert regularizer.weight == pytest.approx(together.weight, rel=1e-5)
    assert regularizer.weight < 1e4
    stopped, before = with_past(model, strength=1e4, guard=StopIfUnstable()), weights(model)
    with stopped.attach(alone, model), pytest.raises(UnstablePenaltyError, match="diverges"):
        plain(model, [alone])
    assert torch.equal(weights(model), before)


def test_a_penalty_that_moves_no_step_and_parameters_out_of_it_are_said_once(model):
    regularizer, optimizer = fresh(1e-12), torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regularizer.attach(optimizer, model)
        for _ in range(3):
            follow(EVENTS[:7] + EVENTS[:6], model, [optimizer], regularizer)
            model.requires_grad_(True)
        follow([(3, None)], model, [], regularizer)
    texts = [str(warning.message) for warning in caught]
    assert ["did nothing" in text for text in texts] == [False, True]
    assert "frozen (requires_grad=False) when the past was absorbed" in texts[0]
    assert caught[1].filename == __file__


def test_a_scaled_step_is_not_taken_for_one_without_penalty(model):
    regularizer = with_past(model, strength=10.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    regularizer.attach(optimizer, model)
    for _ in range(2):
        scaled(model, [optimizer])
    assert 0.1 < regularizer._effect._largest < 3


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Diagonal(), r"past of KroneckerMatrix cannot go on with structure=Diagonal\(\)"),
        (Kronecker(), r"past of KroneckerMatrix with sums=KeepTerms\(\) cannot go on with structure=Kronecker\(\)"),
    ],
    ids=str,
)
def test_a_past_of_another_structure_is_refused_before_a_task_is_trained(structure, message, model):
    data, kept = (model, nn.CrossEntropyLoss(), batches_of(0)), with_past(model, structure=Kronecker(KeepTerms()))
    with pytest.raises(TypeError, match=message):
        fresh(structure=structure, past=kept.past)
    given, optimizer = fresh(structure=structure), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=message):
        given.load_state_dict(kept.state_dict())
    assert given.past == Past()
    given.past = kept.past
    for refused in (
        lambda: given.check(*data), lambda: given.attach(optimizer, model), lambda: given.penalty(model),
        lambda: given.add(model),
    ):
        with pytest.raises(TypeError, match=message):
            refused()
    fresh(structure=Kronecker(KeepTerms()), past=kept.past).check(*data)
    stored = with_past(model, structure=Kronecker(KeepTerms()), policy=Refresh()).past  # to be estimated anew
    fresh(structure=structure, policy=Refresh(), past=stored).absorb(*data)


def test_a_past_that_a_structure_of_ones_own_cannot_add_to_is_refused_before_a_task_is_trained(model):
    class Own(Dense):
        differs_from = Structure.differs_from

    given = fresh(structure=Own(), past=with_past(model, structure=Kronecker()).past)
    with pytest.raises(TypeError, match=r"past of KroneckerMatrix cannot go on with structure=Own\(\): A Kronecker"):
        given.check(model, nn.CrossEntropyLoss(), batches_of(0))


def test_strengths_are_not_suggested_for_arguments_in_another_order(model):
    past, optimizer = with_past(model).past, torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"suggest_strength\(optimizer, model\) takes these in this order"):
        suggest_strength(past, model, optimizer)
    with pytest.raises(TypeError, match=r"optimizer must be an Optimizer; got None"):
        suggest_strength(past, None, model)


def test_diverged_training_keeps_the_past(model):
    regularizer, past = with_past(model), Past()
    optimizer, past = torch.optim.SGD(model.parameters(), lr=0.1), regularizer.past
    regularizer.attach(optimizer, model)
    plain(model, [optimizer])
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteCurvatureError, match=r"The model of the 2 experiences before it .* Strengths to try"):
        regularizer.absorb(model, nn.CrossEntropyLoss(), batches_of(0))
    assert regularizer.past is past


def test_a_model_that_was_moved_takes_its_past_along(model):
    regularizer = with_past(model.float())
    assert regularizer.past.model.anchor.dtype == torch.float32
    optimizer = torch.optim.SGD(model.double().parameters(), lr=0.1)
    with regularizer.attach(optimizer, model):
        plain(model, [optimizer])
    assert regularizer.past.model.anchor.dtype == torch.float64


def test_a_past_made_here_is_not_tried_again_after_the_model_was_moved(model, monkeypatch):
    regularizer = with_past(model.float())
    regularizer.begin(model.double())
    assert regularizer.past.model.anchor.dtype == torch.float64
    monkeypatch.setattr(kept, "estimate", None)
    regularizer.check(model, nn.CrossEntropyLoss(), batches_of(2))


def test_a_copy_made_amid_an_update_knows_that_it_goes_on_and_its_penalty(model):
    regularizer, (head, body) = with_past(model), layers(model)
    regularizer.attach(head, model)
    regularizer.attach(body, model)
    (x, y), *_ = batches_of(2)
    cross_entropy(model(x), y).backward()
    expected = float(regularizer.past.model(model))
    head.step()
    copied = copy.deepcopy(regularizer)
    assert copied.state_dict()["fields"]["unfinished"]
    assert float(copied.last_penalty) == pytest.approx(expected, rel=1e-10)
    body.step()
    assert not regularizer.state_dict()["fields"]["unfinished"]


def test_a_wrapped_optimizer_is_looked_through(model):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = with_past(model)
    with regularizer.attach(Wrapper(optimizer), model):
        plain(model, [optimizer])
    assert regularizer.last_penalty > 0


def test_what_cannot_work_is_refused_with_the_remedy(model):
    regularizer, other = with_past(model), nn.Linear(4, 3).double()
    optimizer, theirs = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"attach\(optimizer, model\) takes"):
        regularizer.attach(model, optimizer)
    with pytest.raises(ValueError, match="steps no parameter of Linear"):
        regularizer.attach(optimizer, other)
    with pytest.raises(ValueError, match="maximises"):
        regularizer.attach(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), model)
    with pytest.raises(TypeError, match="SparseAdam"):
        regularizer.attach(torch.optim.SparseAdam(model.parameters()), model)
    with pytest.raises(ValueError, match="is not in the model any more"):
        regularizer.attach(theirs, other)
    with regularizer.attach(optimizer, model):
        with pytest.raises(RuntimeError, match=r"count twice\. Leave the term out"):
            regularizer.penalty(model)
        with pytest.raises(RuntimeError, match=r"count twice\. Leave the term out"):
            regularizer.add(model)
        with torch.no_grad():
            assert regularizer.penalty(model) > 0  # to look at
        regularizer.past = Past()
        with pytest.raises(RuntimeError, match="attached for another model"):
            regularizer.attach(theirs, other)
    assert regularizer.attach(theirs, other)
    for use in (fresh().penalty, fresh().add):
        with pytest.raises(TypeError, match=r"model must be a Module; got None. Give a value such as the model"):
            use(None)
    with pytest.raises(ValueError, match="Sequential has no parameter that 'head' selects"):
        fresh(include=["head"]).penalty(model)
    with pytest.raises(TypeError, match="Parameters are selected once: give include="):
        regularizer.absorb(model, nn.CrossEntropyLoss(), batches_of(0), include=["0"])
    with pytest.raises(TypeError, match="batches must be pairs"):
        regularizer.check(model, nn.CrossEntropyLoss(), torch.ones(3))
    with pytest.raises(ValueError, match="stores those of 0 of its 2 experiences"):
        fresh(policy=Refresh(), past=with_past(model).past)
    with pytest.warns(UserWarning, match="may be indefinite") as caught:
        fresh(curvature=Hessian())
    assert caught[0].filename == __file__
    before = regularizer.past
    with pytest.raises(ValueError, match="takes what its state_dict"):
        regularizer.load_state_dict({"type": "Past", "fields": {}})
    assert regularizer.past is before
    with pytest.raises(AttributeError, match="curvature of a CurvatureRegularizer cannot be changed"):
        regularizer.curvature = GGN()
    assert repr(fresh()) == "CurvatureRegularizer(strength=3.0, structure=Dense(), guard=None)"


def test_a_matrix_free_past_is_followed_too(model):
    regularizer = with_past(model, tasks=1, structure=MatrixFree(), curvature=GGN(), guard=StopIfUnstable())
    ways = one(torch.optim.SGD, lr=1e-3), regularizer
    assert torch.equal(attached(model, *ways), added(model, *ways))
