import copy

import pytest
import torch
from avalanche.training import Naive
from avalanche.training.plugins import EWCPlugin, ReplayPlugin, SupervisedPlugin
from torch import nn
from torch.nn.functional import cross_entropy

from avalanche_curv import (
    GGN,
    AbsoluteError,
    Accumulate,
    AdaptiveRefresh,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    CurvatureEWCPlugin,
    CurvatureRegularizer,
    Dense,
    Diagonal,
    EmpiricalRisk,
    Fisher,
    Kronecker,
    LowRank,
    Merge,
    Rank,
    Refresh,
    RescaleIfUnstable,
    estimate,
)
from avalanche_curv.core.structures import one_pass

STRENGTH = 8.0


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def plane_in(plane, examples, stream_of):
    """plane_in(dtype): the training stream of the plane."""

    def stream(dtype):
        pairs = [examples(experience) for experience in plane.train_stream]
        return stream_of([(inputs.to(dtype), targets) for inputs, targets in pairs]).train_stream

    return stream


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("policy", "theirs"),
    [
        (Accumulate(), lambda: EWCPlugin(ewc_lambda=128)),
        (Merge(decay=0.5), lambda: EWCPlugin(ewc_lambda=128, mode="online", decay_factor=0.5)),
        (Merge(decay=1.0), lambda: EWCPlugin(ewc_lambda=128, mode="online", decay_factor=1.0)),
    ],
    ids=["separate", "online with decay", "online"],
)
def test_batched_empirical_fisher_reproduces_ewc_of_avalanche(policy, theirs, dtype, net, learner, train, plane_in):
    ours = CurvatureEWCPlugin(256, curvature=BatchedEmpiricalFisher(batch_size=20), policy=policy)
    paths = {}
    for name, plugins in {"ours": [ours], "theirs": [theirs()], "naive": []}.items():
        path = paths[name] = _Path()
        strategy = learner(copy.deepcopy(net).to(dtype), *plugins, path, train_mb_size=20, train_epochs=2)
        train(strategy, plane_in(dtype), shuffle=False)  # Avalanche's EWC shifts the random states
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(paths["ours"].stacked(), paths["theirs"].stacked(), rtol=0, atol=tolerance)
    assert (paths["ours"].stacked()[-1] - paths["naive"].stacked()[-1]).abs().max() > 0.02


class _Path(SupervisedPlugin):
    """The weights after every iteration."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def after_training_iteration(self, strategy, **kwargs):
        self.weights.append(weights(strategy.model))

    def stacked(self):
        return torch.stack(self.weights)


def written_out(past, model):
    """c + gᵀδ + ½ δᵀCδ in plain operations."""
    displacement = torch.cat([p.reshape(-1) for p in model.parameters()]) - past.anchor
    value = past.constant + 0.5 * displacement @ (past.curvature.dense() @ displacement)
    return value if past.gradient is None else value + past.gradient @ displacement


class _Exact(SupervisedPlugin):
    """Compares every step with the loss written out."""

    def __init__(self, ewc):
        super().__init__()
        self.ewc, self.steps = ewc, 0

    def after_backward(self, strategy, **kwargs):
        loss = cross_entropy(strategy.model(strategy.mb_x), strategy.mb_y)
        if self.ewc.past.model is not None:
            penalty = written_out(self.ewc.past.model, strategy.model)
            torch.testing.assert_close(self.ewc.last_penalty, penalty.detach(), rtol=1e-10, atol=1e-12)
            loss = loss + STRENGTH * penalty
            self.steps += 1
        assert strategy.loss.shape == (1,)
        torch.testing.assert_close(strategy.loss[0], loss, rtol=1e-10, atol=1e-12)
        for parameter, gradient in zip(
            strategy.model.parameters(), torch.autograd.grad(loss, strategy.model.parameters())
        ):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("structure", "policy"),
    [(Dense(), Merge(0.5)), (BlockDiagonal(), Accumulate()), (Diagonal(), Refresh(0.5, gradient=True))],
)
def test_every_step_follows_the_gradient_of_the_loss_written_out(
    structure, policy, double, net, learner, train, plane_in
):
    ewc = CurvatureEWCPlugin(STRENGTH, curvature=GGN(), structure=structure, policy=policy)
    exact = _Exact(ewc)
    slow = torch.optim.SGD(net.double().parameters(), lr=0.01)
    train(learner(net, ewc, exact, optimizer=slow), plane_in(torch.float64))
    assert exact.steps == 2 * 3  # 20 + 20 + 8 examples in the second and the third experience


def test_a_quadratic_remembers_its_experience_alone_when_old_examples_are_replayed(
    net, learner, train, plane, examples, recorder
):
    ewc = CurvatureEWCPlugin(1.0, structure=Dense(), policy=Merge(decay=0.0))
    replay = ReplayPlugin(mem_size=30)
    train(learner(net, replay, ewc, recorder), plane.train_stream)
    last = EmpiricalRisk.snapshot(recorder.ends[-1], nn.CrossEntropyLoss(), [examples(plane.train_stream[-1])])
    expected = estimate(Fisher(), Dense(), last).curvature.dense()
    torch.testing.assert_close(ewc.past.model.curvature.dense(), expected, rtol=1e-4, atol=1e-6)
    assert len(replay.storage_policy.buffer) == 30


def test_curvature_is_taken_in_evaluation_mode_on_data_without_training_transforms(learner, train, plane, examples):
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import make_avalanche_dataset
    from avalanche.benchmarks.utils.transform_groups import TransformGroups

    groups = TransformGroups({"train": (torch.zeros_like, None), "eval": (None, None)})
    blank = [make_avalanche_dataset(e.dataset, transform_groups=groups) for e in plane.train_stream]
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    ewc = CurvatureEWCPlugin(1.0)
    strategy = train(learner(model, ewc), benchmark_from_datasets(train=blank[:1]).train_stream)
    risk = EmpiricalRisk.snapshot(strategy.model, nn.CrossEntropyLoss(), [examples(plane.train_stream[0])])
    expected = estimate(Fisher(), Diagonal(), risk).curvature.dense()
    torch.testing.assert_close(ewc.past.model.curvature.dense(), expected, rtol=1e-4, atol=1e-7)
    assert expected[0, 0] > 1e-4  # would vanish for blank inputs


@pytest.mark.parametrize("structure", [Dense(), BlockDiagonal(), Diagonal()])
def test_memory_does_not_grow_with_the_number_of_experiences(structure, net, learner, train, plane):
    ewc = CurvatureEWCPlugin(1.0, structure=structure)
    sizes = _Sizes(ewc)
    train(learner(net, ewc, sizes), [*plane.train_stream, *plane.train_stream])
    parameters = sum(p.numel() for p in net.parameters())
    gradient = 4 * parameters  # of the fold, from the second experience on
    assert sizes.bytes[0] == ewc.past.model.anchor.nbytes + structure.bytes(ewc.past.model.space, itemsize=4)
    assert sizes.bytes[1:] == 5 * [sizes.bytes[0] + gradient]


class _Sizes(SupervisedPlugin):
    def __init__(self, ewc):
        super().__init__()
        self.ewc, self.bytes = ewc, []

    def after_training_exp(self, strategy, **kwargs):
        self.bytes.append(self.ewc.past.model.nbytes)


@pytest.mark.parametrize("policy", [Accumulate(), AdaptiveRefresh(AbsoluteError(1e-4), every=2)], ids=type)
@pytest.mark.parametrize("optimizer_of", [torch.optim.SGD, torch.optim.AdamW])
def test_the_plugin_trains_as_a_regularizer_in_a_loop_of_ones_own(optimizer_of, policy, net, learner, train, plane):
    options = {"curvature": GGN(), "policy": policy, "guard": RescaleIfUnstable(0.1)}
    model, regularizer = copy.deepcopy(net), CurvatureRegularizer(STRENGTH, **options)
    optimizer = optimizer_of(model.parameters(), lr=0.05)
    with regularizer.attach(optimizer, model):
        for number in range(3):
            inputs, targets = _plane(plane, number)
            for x, y in zip(inputs.split(20), targets.split(20)):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            regularizer.absorb(model, nn.CrossEntropyLoss(), [(inputs, targets)])
    ewc = CurvatureEWCPlugin(STRENGTH, **options)
    strategy = learner(net, ewc, optimizer=optimizer_of(net.parameters(), lr=0.05))
    train(strategy, plane.train_stream, shuffle=False)
    assert torch.equal(weights(net), weights(model))
    assert torch.equal(ewc.past.model.anchor, regularizer.past.model.anchor)
    assert ewc.past.refreshes == regularizer.past.refreshes
    assert ewc.weight == regularizer.weight


class _Losses(SupervisedPlugin):
    """The loss of every iteration, as metrics see it."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def after_training_iteration(self, strategy, **kwargs):
        self.losses.append(float(strategy.loss.detach()))


class _Looking(SupervisedPlugin):
    def before_backward(self, strategy, **kwargs):
        pass


@pytest.mark.parametrize("structure", [Diagonal(), Dense(), Kronecker()])
def test_beside_the_loss_the_penalty_trains_to_the_bit_as_a_term_of_it(structure, net, learner, train, plane):
    ends = {}
    for beside in (True, False):
        ewc, losses = CurvatureEWCPlugin(STRENGTH, structure=structure), _Losses()
        between = [] if beside else [_Looking()]
        strategy = train(learner(copy.deepcopy(net), ewc, *between, losses), plane.train_stream)
        assert ewc._beside is beside
        ends[beside] = weights(strategy.model), losses.losses
    assert torch.equal(ends[True][0], ends[False][0])
    assert ends[True][1] == pytest.approx(ends[False][1], rel=1e-5)


def test_hooks_on_gradients_see_the_penalty(net, learner, train, plane):
    """Rows that a mask freezes stay, also where a penalty pulls."""
    ewc = CurvatureEWCPlugin(STRENGTH, structure=Kronecker())
    strategy = learner(net, ewc, optimizer=torch.optim.SGD(net.parameters(), lr=0.05))
    train(strategy, plane.train_stream[:1])
    weight = next(p for p in strategy.model.parameters() if p.ndim == 2)
    mask = torch.ones_like(weight).index_fill_(0, torch.tensor([0]), 0.0)
    weight.register_hook(lambda gradient: gradient * mask)
    before = weight.detach().clone()
    train(strategy, plane.train_stream[1:2])
    assert not ewc._beside
    assert torch.equal(weight[0], before[0])
    assert not torch.equal(weight[1:], before[1:])


@pytest.mark.parametrize("structure", [Diagonal(), Dense(), BlockDiagonal(), Kronecker(), LowRank(Rank(2))], ids=type)
def test_a_step_reads_nothing_of_the_device(structure, net, learner, train, plane, reading, monkeypatch):
    monkeypatch.setattr(one_pass, "loop", lambda *kind: None)  # as on other devices
    ewc, found = CurvatureEWCPlugin(STRENGTH, structure=structure, guard=None), []

    def counted(hook):
        def run(strategy, **kwargs):
            with reading() as reads:
                hook(strategy, **kwargs)
            if strategy.clock.train_exp_iterations:  # the first step makes what others use
                found.append(reads.count)

        return run

    ewc.after_backward, ewc.after_update = counted(ewc.after_backward), counted(ewc.after_update)
    train(learner(net, ewc), plane.train_stream[:2])
    assert ewc._beside
    assert found == [0] * 8


class _HalvedGradients(SupervisedPlugin):
    def after_backward(self, strategy, **kwargs):
        for parameter in strategy.model.parameters():
            parameter.grad.mul_(0.5)


class _HalvedLoss(SupervisedPlugin):
    def before_backward(self, strategy, **kwargs):
        strategy.loss = 0.5 * strategy.loss


class _Scaled(Naive):
    """Differentiates a quarter of the loss, and steps with four times the gradients."""

    def backward(self):
        (self.loss / 4).backward()

    def optimizer_step(self):
        for parameter in self.model.parameters():
            parameter.grad.mul_(4)
        super().optimizer_step()


def test_what_scales_the_loss_or_the_gradients_scales_those_of_the_penalty(net, learner, train, plane):
    def end(*plugins, lr=0.1, **options):
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return weights(train(learner(model, *plugins, optimizer=optimizer, **options), plane.train_stream).model)

    def ewc():
        return CurvatureEWCPlugin(STRENGTH, guard=None)

    expected = end(ewc(), lr=0.05)
    torch.testing.assert_close(end(_HalvedGradients(), ewc()), expected)
    torch.testing.assert_close(end(ewc(), _HalvedGradients()), expected)
    torch.testing.assert_close(end(ewc(), _HalvedLoss()), expected)
    torch.testing.assert_close(end(ewc(), lr=0.05, kind=_Scaled), expected)
    assert (expected - end(lr=0.05)).abs().max() > 1e-3


def test_sparse_adam_is_refused_before_the_first_step(net, learner, train, plane, recorder):
    strategy = learner(net, CurvatureEWCPlugin(1.0), recorder, optimizer=torch.optim.SparseAdam(net.parameters()))
    with pytest.raises(TypeError, match="SparseAdam steps sparse gradients alone"):
        train(strategy, plane.train_stream[:1])
    assert not recorder.steps


def test_under_autocast_the_penalty_of_a_strategy_is_in_the_type_of_the_parameters(net, learner, train, plane):
    class Watching(SupervisedPlugin):
        errors = ()

        def before_backward(self, strategy, **kwargs):
            if ewc.past.model is not None:
                past, step = ewc.past.model, ewc.past.model.displacement(strategy.model).double()
                exact = step @ past.curvature.dense().double() @ step / 2
                self.errors = (*self.errors, float(abs(ewc.last_penalty - exact)) - 1e-5 * float(exact))

    ewc, watching = CurvatureEWCPlugin(1.0, structure=Dense()), Watching()
    with torch.autocast("cpu", torch.bfloat16):
        train(learner(net.float(), ewc, watching), plane.train_stream[:2])
    assert len(watching.errors) == 3
    assert max(watching.errors) <= 1e-9


def _plane(plane, number):
    inputs, targets, _ = zip(*plane.train_stream[number].dataset)
    return torch.stack(inputs), torch.tensor(targets)
