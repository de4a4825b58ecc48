import copy
import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import make_avalanche_dataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.models import SimpleCNN, avalanche_forward
from avalanche.training import Replay
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_curv import SineBoundary
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.metrics.plasticity import FromScratch, ProbeMetric, plasticity_metrics
from avalanche_curv.tensorboard import CHARTS

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
WEIGHTS = ("spectral_norm", "frobenius_norm", "stable_rank", "effective_rank", "condition_number")
WHOLE = (
    "parameter_norm", "dormant_units", "zero_units", "feature_effective_rank", "feature_stable_rank",
    "gradient_effective_rank", "gradient_condition_number", *WEIGHTS,
)  # fmt: skip
TASK = "plasticity_experience"


def published(strategy):
    return strategy.evaluator.get_all_metrics()


@pytest.fixture
def measured(learner, train):
    """measured(model, experiences, *plugins, metrics=..., ...): what is published along training, by name."""

    def run(model, experiences, *plugins, every=1, from_scratch=None, metrics=None, **options):
        metrics = metrics or plasticity_metrics(every=every, from_scratch=from_scratch)
        return published(train(learner(model, *plugins, metrics=metrics, **options), experiences))

    return run


@pytest.fixture
def learners(monkeypatch):
    """The learners from scratch, one for each task."""
    trained, original = [], FromScratch.learner
    monkeypatch.setattr(FromScratch, "learner", lambda *args: trained.append(original(*args)) or trained[-1])
    return trained


def of_singular_values(matrix):
    values = np.linalg.svd(matrix.detach().double().numpy(), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return {
        "spectral_norm": values[0],
        "frobenius_norm": np.sqrt((values**2).sum()),
        "stable_rank": (values**2).sum() / values[0] ** 2,
        "effective_rank": np.prod(shares**-shares),
        "condition_number": values[0] / values[-1] if values[-1] > 0 else math.inf,
    }


# --- values on paper ---


def hidden(model, inputs):
    """What the one activation module of both growing models gives."""
    with torch.no_grad():
        features = model[:2] if isinstance(model, nn.Sequential) else model.features
        return features(inputs)


def gradients(model, inputs, targets, task):
    rows = []
    for x, y in zip(inputs, targets):
        loss = F.cross_entropy(avalanche_forward(model, x[None], torch.tensor([task])), y[None])
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def test_values_equal_those_of_explicit_matrices(double, growing, learner, train, examples, recorder):
    model, benchmark = growing(torch.float64)
    metrics = plasticity_metrics(every=1, examples=7, threshold=0.8, seed=3)
    strategy = train(learner(model, recorder, metrics=metrics, train_mb_size=25), benchmark.train_stream)
    names, heads = published(strategy), not isinstance(model, nn.Sequential)
    for number, experience in enumerate(benchmark.train_stream):
        inputs, targets = (part[random_part(50, 7 / 50, part_seed(3, number))] for part in examples(experience))
        now = recorder.ends[number]
        expected = {"parameter_norm": float(torch.cat([p.detach().reshape(-1) for p in now.parameters()]).norm())}
        weights = {name: of_singular_values(p) for name, p in now.named_parameters() if p.ndim > 1}
        for quantity in WEIGHTS:
            expected |= {f"{quantity}/{name}": values[quantity] for name, values in weights.items()}
            expected[quantity] = sum(values[quantity] for values in weights.values()) / len(weights)
        h = hidden(now, inputs)
        scores = h.abs().mean(0) / h.abs().mean(0).mean()
        expected["dormant_units"] = float((scores <= 0.8).double().mean())
        expected["zero_units"] = float((h.abs().amax(0) == 0).double().mean())
        expected["feature_effective_rank"] = of_singular_values(h)["effective_rank"]
        expected["feature_stable_rank"] = of_singular_values(h)["stable_rank"]
        of_gradients = of_singular_values(gradients(now, inputs, targets, number if heads else 0))
        for name in ("effective_rank", "condition_number"):
            expected[f"gradient_{name}"] = of_gradients[name]
        for name, value in expected.items():
            for group, at in ((TASK, 2 * number + 2), ("plasticity", 2 * number + 1)):  # the last iteration
                steps, found = names[f"{group}/{name}"]
                assert found[steps.index(at)] == pytest.approx(value, rel=1e-5), name


def test_change_is_from_the_start_of_a_task_to_that_of_the_next_on_the_probe_of_the_first(
    double, growing, learner, train, examples, recorder
):
    class Perturb(SupervisedPlugin):
        """What a mitigator does between tasks counts."""

        def after_training_exp(self, strategy, **kwargs):
            with torch.no_grad():
                for parameter in strategy.model.parameters():
                    parameter.mul_(0.5)

    model, benchmark = growing(torch.float64)
    start = copy.deepcopy(model).eval()
    metrics = plasticity_metrics(every=100, examples=9, seed=1)
    names = published(train(learner(model, Perturb(), recorder, metrics=metrics), benchmark.train_stream))
    starts = [start, *recorder.ends]  # of which the hidden layer does not grow
    expected = []
    for number, experience in enumerate(benchmark.train_stream[:2]):
        inputs = examples(experience)[0][random_part(50, 9 / 50, part_seed(1, number))]
        then, now = (hidden(starts[at], inputs) for at in (number, number + 1))
        expected.append(float((now - then).norm() / then.norm()))
    steps, values = names[f"{TASK}/representation_change"]
    assert steps == [3, 6]
    assert values == pytest.approx(expected, rel=1e-9)
    assert names[f"{TASK}/spectral_norm"][0] == [3, 6, 9]


def test_fractions_are_of_all_units_and_ranks_are_means_over_layers(make, learner, train, plane):
    net = make(lambda: nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 2)))
    with torch.no_grad():
        net[2].bias[0] = -1e6
    last = train(learner(net, metrics=plasticity_metrics(every=1)), plane.train_stream).evaluator.get_last_metrics()
    for name in ("dormant_units", "zero_units"):
        assert last[f"plasticity/{name}"] == pytest.approx(
            (9 * last[f"plasticity/{name}/1"] + 3 * last[f"plasticity/{name}/3"]) / 12
        )
    assert last["plasticity/zero_units/3"] >= 1 / 3
    for name in ("feature_effective_rank", "feature_stable_rank"):
        mean = (last[f"plasticity/{name}/1"] + last[f"plasticity/{name}/3"]) / 2
        assert last[f"plasticity/{name}"] == pytest.approx(mean)


# --- what is published, and when ---


def test_every_head_publishes_the_same_names_and_python_floats_beside_replay(growing, learner, train):
    model, benchmark = growing()
    metrics = plasticity_metrics(every=2, examples=10, from_scratch=FromScratch(SGD))
    names = published(train(learner(model, kind=Replay, metrics=metrics, mem_size=20), benchmark.train_stream))
    assert set(CHARTS["Plasticity"].values()) <= set(names)
    whole = {f"{group}/{name}" for group in ("plasticity", "plasticity_experience") for name in WHOLE}
    ends = ("accuracy", "accuracy_from_scratch", "loss_of_plasticity", "representation_change")
    whole |= {f"{TASK}/{name}" for name in ends}
    assert {name for name in names if name.count("/") == 1} == whole
    for _, values in names.values():
        assert all(type(value) is float and math.isfinite(value) for value in values)


def test_every_n_counts_from_the_first_of_the_six_iterations_of_each_experience(net, measured, plane):
    names = measured(net, plane.train_stream, every=4, train_epochs=2)
    for name in ("spectral_norm", "spectral_norm/0.weight", "dormant_units/1", "gradient_effective_rank"):
        assert names[f"plasticity/{name}"][0] == [0, 4, 6, 10, 12, 16]
        assert names[f"{TASK}/{name}"][0] == [6, 12, 18]
    assert names[f"{TASK}/accuracy"][0] == [6, 12, 18]


class Relu(nn.Module):
    """No module that is known as an activation."""

    def forward(self, x):
        return F.relu(x)


def test_functional_activations_and_convolutions_are_measured(make, measured, digits, stream_of, examples):
    model = make(lambda: nn.Sequential(nn.Linear(64, 6), Relu(), nn.Linear(6, 10)))
    names = measured(model, digits().train_stream)
    assert "plasticity/dormant_units/2" in names
    parts = [examples(experience) for experience in digits().train_stream]
    images = stream_of([(inputs.view(-1, 1, 8, 8).repeat(1, 3, 4, 4)[:6], targets[:6]) for inputs, targets in parts])
    names = measured(make(lambda: SimpleCNN(num_classes=10)), images.train_stream)
    layers = {name.rpartition("/")[2] for name in names if name.startswith("plasticity/zero_units/")}
    assert layers == {"features.1", "features.3", "features.7", "features.9", "features.13"}
    assert "plasticity/gradient_effective_rank" in names


def test_an_online_stream_has_one_probe_and_one_accuracy_a_task(net, learner, train, plane):
    parts = list(split_online_stream(plane.train_stream, 16, access_task_boundaries=True, seed=0))
    metrics = plasticity_metrics(every=2, examples=1000, from_scratch=FromScratch(SGD))
    names = published(train(learner(net, metrics=metrics, train_mb_size=8), parts))  # 3 parts of 2 iterations
    assert names["plasticity/spectral_norm"][0] == names["plasticity/dormant_units"][0] == list(range(0, 18, 2))
    for name in ("spectral_norm", "dormant_units", "accuracy", "accuracy_from_scratch"):
        assert names[f"{TASK}/{name}"][0] == [6, 12, 18]
    assert names[f"{TASK}/representation_change"][0] == [6, 12]
    assert metrics[1]._probe.examples == 48


# --- accuracy at the end of a task, and from scratch ---


def share_right(model, inputs, targets, task=0):
    model.eval()
    with torch.no_grad():
        outputs = [avalanche_forward(model, x[None], torch.tensor([task]))[0] for x in inputs]
    return sum(int(o.argmax()) == int(y) for o, y in zip(outputs, targets)) / len(targets)


def test_accuracy_is_that_on_all_training_examples_at_the_end(growing, learner, train, examples, recorder):
    model, benchmark = growing()
    strategy = train(learner(model, recorder, metrics=plasticity_metrics(examples=2)), benchmark.train_stream)
    expected = [
        share_right(end, *examples(experience), experience.task_labels[0])
        for end, experience in zip(recorder.ends, benchmark.train_stream)
    ]
    assert published(strategy)[f"{TASK}/accuracy"][1] == pytest.approx(expected)
    assert f"{TASK}/accuracy_from_scratch" not in published(strategy)


def test_from_scratch_is_a_plain_loop_from_the_first_weights_on_each_task_alone(double, make, learner, train, examples,
                                                                                digits):
    """With all examples in one batch the order of drawing plays no part."""
    net = make(lambda: nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 10)))
    first, benchmark = copy.deepcopy(net), digits(dtype=torch.float64)
    metrics = plasticity_metrics(from_scratch=FromScratch(SGD))
    options = {"train_mb_size": 50, "train_epochs": 5}
    names = published(train(learner(net, metrics=metrics, **options), benchmark.train_stream))
    expected = []
    for experience in benchmark.train_stream:
        model, (inputs, targets) = copy.deepcopy(first), examples(experience)
        optimizer = SGD(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        expected.append(share_right(model, inputs, targets))
    found, own = (names[f"{TASK}/{name}"][1] for name in ("accuracy_from_scratch", "accuracy"))
    assert found == pytest.approx(expected)
    assert found[0] == own[0]  # the first task is learned from scratch anyway
    assert found[1:] != own[1:]
    lost = names[f"{TASK}/loss_of_plasticity"][1]
    assert lost == pytest.approx([a - b for a, b in zip(found, own)])


def test_from_scratch_a_head_grows_for_the_task_alone(growing, measured, learners):
    model, benchmark = growing()
    before = {name: p.shape for name, p in model.named_parameters()}
    measured(model, benchmark.train_stream, from_scratch=FromScratch(SGD))
    for one, experience in zip(learners, benchmark.train_stream):
        largest = max(experience.classes_in_this_experience)
        if isinstance(model, nn.Sequential):
            assert one.model[2].classifier.out_features == largest + 1
        else:
            assert list(one.model.classifier.classifiers) == [*dict.fromkeys(["0", str(experience.task_labels[0])])]
        assert one.model is not model
    assert before != {name: p.shape for name, p in model.named_parameters()}


def test_from_scratch_takes_as_many_steps_as_the_learner_also_where_a_plugin_ends_the_task_early(
    net, learner, train, plane
):
    class Stop(SupervisedPlugin):
        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations + 1 >= 7:
                strategy.stop_training()

    counts = []

    def counted(parameters):
        optimizer, place = SGD(parameters), len(counts)
        counts.append(0)
        optimizer.register_step_post_hook(lambda *_: counts.__setitem__(place, counts[place] + 1))
        return optimizer

    metrics = plasticity_metrics(from_scratch=FromScratch(counted))
    train(learner(net, metrics=metrics, train_epochs=4), plane.train_stream[:2])
    assert counts == [12, 12]
    train(learner(net, Stop(), metrics=metrics, train_epochs=50), plane.train_stream[:2])
    assert counts == [12, 12, 7, 7]


def test_the_seed_sets_the_order_of_batches(make, learner, train, plane, learners):
    def weights(seed, outer):
        net = make(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)))
        metrics = plasticity_metrics(from_scratch=FromScratch(SGD, seed=seed))
        train(learner(net, metrics=metrics), plane.train_stream[:1], seed=outer)
        return learners[-1].model[0].weight

    assert torch.equal(weights(0, outer=0), weights(0, outer=1))
    assert not torch.equal(weights(0, outer=0), weights(1, outer=0))


# --- no trace ---


def noise(x):
    """Draws from every global random state."""
    return x + 0.1 * torch.randn(x.shape) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002


@pytest.fixture(scope="module")
def noisy():
    benchmark = SineBoundary(3, examples=40, seed=0)
    groups = TransformGroups({"train": (noise, None), "eval": (noise, None)})
    for experience in benchmark.train_stream:
        experience._dataset = make_avalanche_dataset(experience.dataset, transform_groups=groups)
    return benchmark


def trace(strategy):
    return [
        *strategy.model.state_dict().values(),
        *(p.grad for p in strategy.model.parameters()),
        *(value for state in strategy.optimizer.state.values() for value in state.values()),
        torch.tensor([module.training for module in strategy.model.modules()]),
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1]),
        torch.from_numpy(np.random.get_state()[1].astype("int64")),  # noqa: NPY002
        strategy.loss,
    ]


@pytest.mark.parametrize("from_scratch", [None, FromScratch(SGD, seed=5)])
def test_measuring_trains_bit_identically_to_naive(from_scratch, make, learner, train, noisy):
    def run(metrics):
        model = make(
            lambda: nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
        )
        adam = torch.optim.Adam(model.parameters(), lr=0.05)
        return trace(train(learner(model, metrics=metrics, optimizer=adam, train_mb_size=10), noisy.train_stream))

    measured = run(plasticity_metrics(every=1, examples=9, from_scratch=from_scratch))
    for a, b in zip(run([]), measured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("from_scratch", [None, FromScratch(SGD)])
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(from_scratch, assert_resumes):
    metrics = plasticity_metrics(every=2, examples=9, from_scratch=from_scratch)
    assert_resumes(metrics)


def test_metrics_can_be_pickled_and_keep_no_data_set(net, learner, train, plane):
    metrics = plasticity_metrics(every=2, from_scratch=FromScratch(SGD))
    train(learner(net, metrics=metrics), plane.train_stream)
    assert len(pickle.dumps(metrics)) < 2**16
    assert metrics[2]._trained == []


# --- what cannot be measured ---


def test_a_run_that_diverges_goes_on_with_what_is_defined(net, measured, plane):
    wild = torch.optim.SGD(net.parameters(), lr=math.inf)
    names = measured(net, plane.train_stream, from_scratch=FromScratch(SGD), optimizer=wild)
    assert not [name for name in names if name.startswith("plasticity/")]
    ends = {name for name in names if name.startswith(f"{TASK}/")}
    assert ends == {f"{TASK}/{n}" for n in ("accuracy", "accuracy_from_scratch", "loss_of_plasticity")}
    assert all(math.isfinite(value) for _, values in names.values() for value in values)


def test_a_condition_that_is_infinite_is_left_out(make, measured, plane):
    net = make(lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    nn.init.constant_(net[2].weight, 1.0)
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    names = measured(net, plane.train_stream, optimizer=still)
    assert "plasticity/condition_number/0.weight" in names
    assert "plasticity/condition_number/2.weight" not in names
    assert "plasticity/condition_number" not in names
    assert names["plasticity/effective_rank/2.weight"][1][0] == pytest.approx(1)


def test_regression_has_no_accuracy_and_none_from_scratch(make, measured, regression):
    def run(**options):
        net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).double()
        return measured(net, regression.train_stream, criterion=nn.MSELoss(), **options)

    names = run()
    assert "plasticity/gradient_effective_rank" in names
    assert f"{TASK}/accuracy" not in names
    with pytest.raises(ValueError, match="from_scratch compares accuracies, but the targets are no classes"):
        run(from_scratch=FromScratch(SGD))


def test_models_and_criteria_that_cannot_be_measured_are_refused_before_the_first_step(net, measured, plane):
    linear = nn.Linear(2, 2)
    before = copy.deepcopy(linear.weight)
    with pytest.raises(ValueError, match="Linear has no hidden activations"):
        measured(linear, plane.train_stream)
    assert torch.equal(linear.weight, before)
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        measured(net, plane.train_stream, criterion=lambda o, y: o.std())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"every": 0}, ValueError, "every must be an integer of at least 1; got 0"),
        ({"examples": 0}, ValueError, "examples must be an integer of at least 1; got 0"),
        ({"threshold": -1}, ValueError, "threshold must be a finite number, at least 0; got -1"),
        ({"from_scratch": SGD}, TypeError, r"from_scratch takes FromScratch\(optimizer=...\) or None"),
    ],
)
def test_unusable_options_are_refused_with_a_remedy(options, kind, message):
    with pytest.raises(kind, match=message):
        plasticity_metrics(**options)


def test_from_scratch_wants_a_maker_of_optimisers_and_not_one(net):
    with pytest.raises(TypeError, match=r"a callable that makes an optimiser of parameters.*got a SGD"):
        FromScratch(SGD(net.parameters()))


def test_a_probe_is_measured_in_training_only(net, learner):
    with pytest.raises(RuntimeError, match="Plasticity is measured in training"):
        ProbeMetric(1, 5, 0.1, 0)._published(learner(net), "plasticity")
