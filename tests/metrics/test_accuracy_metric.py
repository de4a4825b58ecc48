import pytest
import torch
from avalanche.models import avalanche_forward

from avalanche_curv import fidelity_metrics
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.metrics.accuracy import TaskAccuracyMetric


def right(model, inputs, targets, task):
    """The share of examples whose largest logit is that of their class, one after the other."""
    model.eval()
    hits = 0
    with torch.no_grad():
        for x, y in zip(inputs, targets):
            logits = avalanche_forward(model, x[None], torch.tensor([task]))[0]
            hits += int(logits.argmax()) == int(y)
    return hits / len(targets)


@pytest.mark.parametrize("source", ["test stream", "training examples"])
def test_accuracies_equal_a_count(source, growing, learner, train, examples, recorder):
    fraction, seed = 0.3, 4
    model, benchmark = growing()
    stream = benchmark.test_stream if source == "test stream" else None
    metrics = fidelity_metrics(every=1, fraction=fraction, seed=seed, stream=stream)
    strategy = train(learner(model, recorder, metrics=metrics), benchmark.train_stream)
    tasks = [experience.task_labels[0] for experience in benchmark.train_stream]
    data = [examples(experience) for experience in stream or benchmark.train_stream]
    parts = [random_part(50, fraction, part_seed(seed, t)) for t in range(3)]
    stored = [
        tuple(tensor[kept] for tensor in examples(experience))
        for experience, kept in zip(benchmark.train_stream, parts)
    ]
    names = strategy.evaluator.get_all_metrics()
    for step, current in ((2, 0), (5, 1), (8, 2)):  # the last of three iterations in each experience
        at = recorder.steps[step]
        counted = {"current_task": right(at, *data[current], tasks[current])}
        if current:
            for name, held in (("past_tasks", data), ("stored", stored)):
                rates = [right(at, *held[t], tasks[t]) for t in range(current)]
                counted[name] = sum(rates) / len(rates)
        for name, value in counted.items():
            steps, values = names[f"accuracy/{name}"]
            assert values[steps.index(step)] == pytest.approx(value)
            assert names[f"accuracy_experience/{name}"][1][current - (name != "current_task")] == pytest.approx(value)
    assert "accuracy/past_tasks" in names


def test_at_most_the_limit_of_examples_is_looked_at(net, learner, train, plane, examples, recorder):
    metric = TaskAccuracyMetric(every=1, stream=None, fraction=0.1, seed=2, limit=12)
    strategy = train(learner(net, recorder, metrics=[metric]), plane.train_stream[:1])
    kept = random_part(48, 12 / 48, part_seed(2, 0))
    inputs, targets = (tensor[kept] for tensor in examples(plane.train_stream[0]))
    assert len(kept) == 12
    assert strategy.evaluator.get_last_metrics()["accuracy/current_task"] == right(recorder.ends[0], inputs, targets, 0)


def test_a_stream_that_is_too_short_is_refused(net, learner, train, plane):
    metrics = fidelity_metrics(stream=plane.test_stream[:2])
    with pytest.raises(ValueError, match=r"has 2 experiences, but experience 2 is being trained. Give a stream"):
        train(learner(net, metrics=metrics), plane.train_stream)


def test_training_mode_is_put_back_module_by_module(net, learner, train, plane):
    net[0].eval()  # a frozen layer, as one may wish
    flags = []

    class Spy(TaskAccuracyMetric):
        def before_training_exp(self, strategy):
            net[0].eval()
            return super().before_training_exp(strategy)

        def after_training_iteration(self, strategy):
            values = super().after_training_iteration(strategy)
            flags.append([module.training for module in net])
            return values

    train(learner(net, metrics=[Spy(1, None, 0.1, 0)]), plane.train_stream[:1])
    assert flags == 3 * [[False, True, True]]
