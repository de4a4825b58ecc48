"""What works between two tasks waits until the first is measured, evaluated and remembered."""

import torch
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.training.plugins import SupervisedPlugin
from torch import nn

from avalanche_curv import AfterTask, CurvatureEWC, MitigatorPlugin, ShrinkAndPerturb, plasticity_metrics


class Ends(SupervisedPlugin):
    """The weights after each experience, and before the first step of each."""

    def __init__(self):
        super().__init__()
        self.ends, self.starts = [], []

    def before_training_epoch(self, strategy, **kwargs):
        self.starts.append(strategy.model.weight.detach().clone())

    def after_training_exp(self, strategy, **kwargs):
        self.ends.append(strategy.model.weight.detach().clone())


def test_weights_are_halved_between_tasks_and_not_before_they_are_remembered(digits, train):
    torch.manual_seed(0)
    model, ends = nn.Linear(64, 10), Ends()
    halving = MitigatorPlugin(ShrinkAndPerturb(0.5, 0.0, when=AfterTask()))
    strategy = CurvatureEWC(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), strength=1.0, train_mb_size=50,
        plugins=[halving, ends], evaluator=None,
    )  # fmt: skip
    anchors = []
    for experience in digits().train_stream:
        strategy.train(experience)
        anchors.append(strategy.ewc.past.model.anchor)
        assert torch.equal(model.weight, ends.ends[-1])
    for end, start in zip(ends.ends, ends.starts[1:]):
        assert torch.equal(start, 0.5 * end)


def test_the_accuracy_of_a_task_is_that_before_the_perturbation(digits, train, learner):
    found = []
    for plugins in ([], [MitigatorPlugin(ShrinkAndPerturb(1.0, 1.0, when=AfterTask()))]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
        strategy = learner(model, *plugins, metrics=plasticity_metrics(), train_epochs=5)
        train(strategy, digits().train_stream[:1])
        found.append(strategy.evaluator.get_all_metrics()["plasticity_experience/accuracy"])
    assert found[0] == found[1]


def test_rows_that_grow_for_the_next_task_are_not_touched(growing, learner, train):
    """What works between two tasks does so before the model grows."""
    model, stream = growing()
    seen = []

    class Grown(SupervisedPlugin):
        def before_train_dataset_adaptation(self, strategy, **kwargs):
            seen.append({name: p.detach().clone() for name, p in strategy.model.named_parameters()})

    plugin = MitigatorPlugin(ShrinkAndPerturb(1.0, 0.0, when=AfterTask()))
    ends = Firsts()
    train(learner(model, plugin, Grown(), ends), stream.train_stream)
    assert not any(p.any() for shrunk in seen[1:] for p in shrunk.values())
    assert any(p.any() for first in ends.firsts[1:] for p in first.values())  # new rows and heads


class Firsts(SupervisedPlugin):
    """The parameters as each experience begins to train."""

    def __init__(self):
        super().__init__()
        self.firsts = []

    def before_training_epoch(self, strategy, **kwargs):
        self.firsts.append({name: p.detach().clone() for name, p in strategy.model.named_parameters()})


def test_an_online_stream_that_hides_its_boundaries_has_no_ends_of_tasks(digits, learner, train):
    called = []

    class Counted(ShrinkAndPerturb):
        def after_task(self, model, optimizer):
            called.append(self.steps)

    for told in (False, True):
        model = nn.Linear(64, 10)
        parts = split_online_stream(digits().train_stream, experience_size=25, access_task_boundaries=told)
        plugin = MitigatorPlugin(Counted(0.5, 0.0, when=AfterTask()))
        train(learner(model, plugin, train_mb_size=25), parts)
        assert len(called) == (2 if told else 0)
