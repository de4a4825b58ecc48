"""What works between two tasks waits until the first is measured, evaluated and remembered."""

import torch
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
