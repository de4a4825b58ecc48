import copy

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import (
    ConstantSequence,
    DataAttribute,
    TaskAwareSupervisedClassificationDataset,
    TaskLabels,
)
from avalanche.models import MTSimpleMLP, MultiHeadClassifier, MultiTaskModule
from torch import nn

from avalanche_curv import (
    Accumulate,
    BatchedEmpiricalFisher,
    CurvatureEWCPlugin,
    Dense,
    Policy,
    Refresh,
    fidelity_metrics,
)
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.plugins import _batches


class Counting(Policy):
    """Accumulation, and the number of examples of each experience it was given."""

    def __init__(self):
        self.examples = []

    def absorb(self, past, risk, curvature, structure):
        self.examples.append(risk.examples)
        return Accumulate().absorb(past, risk, curvature, structure)


def published(strategy):
    return strategy.evaluator.get_all_metrics()


# 48 examples a task: 20 + 20 + 8, or three equal parts, of which Avalanche marks none as the last one.
@pytest.mark.parametrize(
    ("size", "drop_last"), [(20, False), (16, False), (48, False), (100, False), (20, True), (16, True), (48, True)]
)
def test_a_task_split_online_is_absorbed_once_and_whole_at_its_end(size, drop_last, net, learner, train, plane):
    stream = split_online_stream(plane.train_stream, size, access_task_boundaries=True, drop_last=drop_last, seed=0)
    ewc = CurvatureEWCPlugin(1.0, policy=Counting())
    metrics = fidelity_metrics(every=1, fraction=0.5, stream=plane.test_stream)
    strategy = train(learner(net, ewc, metrics=metrics), stream)
    assert ewc.policy.examples == [48, 48, 48]
    names = published(strategy)
    assert len(names["fidelity_experience/accumulate/kappa/experience_0"][1]) == 2
    assert len(names["fidelity_experience/accumulate/kappa/experience_1"][1]) == 1
    assert "fidelity_experience/accumulate/kappa/experience_2" not in names
    first_step = names["fidelity/accumulate/kappa"][0][0]
    assert first_step == strategy.clock.train_iterations // 3


class WithNoise:
    """(input, target, something else)."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index], torch.full((3,), 9.0)


def with_extra_field(benchmark, examples):
    """The same training stream, with a further field between target and task label."""
    sets = []
    for experience in benchmark.train_stream:
        inputs, targets = examples(experience)
        data = WithNoise(inputs, targets.tolist())
        labels = TaskLabels(ConstantSequence(experience.task_labels[0], len(inputs)))
        attributes = [DataAttribute(targets.tolist(), "targets"), labels]
        sets.append(TaskAwareSupervisedClassificationDataset([data], data_attributes=attributes))
    stream = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=sets))).train_stream
    for experience in stream:
        experience.classes_in_this_experience = sorted(experience.classes_in_this_experience)
    return stream


def test_fields_between_target_and_task_label_do_not_matter(growing, learner, train, examples):
    pasts, values = [], []
    for extra in (False, True):
        model, benchmark = growing()
        stream = with_extra_field(benchmark, examples) if extra else benchmark.train_stream
        assert len(stream[0].dataset[0]) == 3 + extra
        ewc = CurvatureEWCPlugin(1.0, structure=Dense(), policy=Refresh(fraction=0.3))
        strategy = train(learner(model, ewc, metrics=fidelity_metrics(every=1, fraction=0.2)), stream)
        pasts.append(ewc.past.model)
        values.append(published(strategy))
    assert torch.equal(pasts[0].curvature.dense(), pasts[1].curvature.dense())
    assert torch.equal(pasts[0].anchor, pasts[1].anchor)
    assert values[0] == values[1]


@pytest.mark.parametrize("curvature", [None, BatchedEmpiricalFisher(batch_size=9)])
def test_data_over_the_memory_limit_give_the_same_curvature(curvature, net, learner, train, plane, monkeypatch):
    pasts = []
    for limit in (2**30, 0):
        monkeypatch.setattr(_batches, "IN_MEMORY_BYTES", limit)
        options = {} if curvature is None else {"curvature": curvature}
        ewc = CurvatureEWCPlugin(1.0, structure=Dense(), batch_size=7, policy=Refresh(fraction=1.0), **options)
        metrics = fidelity_metrics(every=3, fraction=1.0)
        strategy = train(learner(copy.deepcopy(net), ewc, metrics=metrics), plane.train_stream)
        assert isinstance(ewc.past.stored[-1].batches, tuple) == bool(limit)
        pasts.append((ewc.past.model.curvature.dense(), strategy.evaluator.get_last_metrics()))
    (in_memory, values), (loaded, same_values) = pasts
    torch.testing.assert_close(loaded, in_memory)
    assert values == pytest.approx(same_values, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_number_of_examples_loaded_at_once_does_not_matter(batch_size, net, learner, train, plane):
    dense = {}
    for size in (48, batch_size):
        ewc = CurvatureEWCPlugin(1.0, structure=Dense(), batch_size=size)
        train(learner(copy.deepcopy(net), ewc), plane.train_stream[:1])
        dense[size] = ewc.past.model.curvature.dense()
    torch.testing.assert_close(dense[batch_size], dense[48])


def test_a_model_in_data_parallel_trains_like_the_bare_one(net, learner, train, plane):
    trained = []
    for wrapper in (lambda model: model, nn.DataParallel):
        ewc = CurvatureEWCPlugin(5.0, structure=Dense())
        strategy = train(
            learner(wrapper(copy.deepcopy(net)), ewc, metrics=fidelity_metrics(every=1, fraction=0.2)),
            plane.train_stream,
        )
        trained.append((strategy, ewc.past.model))
    (bare, past), (wrapped, past_of_wrapped) = trained
    assert past_of_wrapped.space == past.space
    assert torch.equal(past_of_wrapped.anchor, past.anchor)
    assert past_of_wrapped(bare.model) == past_of_wrapped(wrapped.model) == past(bare.model)
    assert bare.evaluator.get_all_metrics() == wrapped.evaluator.get_all_metrics()


class Compiled(nn.Module):
    """Wraps as `torch.compile` does."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_a_compiled_model_is_read_by_the_names_of_the_bare_one(net, learner, train, plane):
    ewc = CurvatureEWCPlugin(1.0)
    train(learner(net, ewc), plane.train_stream)
    past = ewc.past.model
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.1
    whole, layers = Compiled(moved), nn.Sequential(*[Compiled(layer) for layer in moved])
    assert unwrapped(nn.DataParallel(whole)) is moved
    assert past(whole) == past(layers) == past(moved) > 0


def test_a_multi_task_model_may_wrap_its_heads(make, digits, learner, train):
    class Own(MultiTaskModule):
        def __init__(self):
            super().__init__()
            self.features, self.heads = nn.Linear(64, 3), MultiHeadClassifier(3, masking=False)

        def forward(self, x, task_labels):
            return self.heads(torch.tanh(self.features(x)), task_labels)

    ewc = CurvatureEWCPlugin(1.0, structure=Dense())
    train(learner(make(Own), ewc, metrics=fidelity_metrics(every=2)), digits(True).train_stream)
    assert ewc.past.experiences == 3


def test_a_model_that_treats_an_integer_task_label_otherwise_is_refused(make, digits, learner, train):
    class Odd(MTSimpleMLP):
        def forward(self, x, task_labels):
            return super().forward(x, task_labels) + isinstance(task_labels, int)

    model = make(lambda: Odd(input_size=64, hidden_size=3))
    with pytest.raises(ValueError, match=r"Let forward\(\) treat both alike"):
        train(learner(model, CurvatureEWCPlugin(1.0)), digits(True).train_stream)
