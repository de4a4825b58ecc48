"""Networks: perceptrons, and a head for each task."""

from __future__ import annotations

from itertools import pairwise

from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from jaxtyping import Float, Int
from torch import Tensor, nn


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    """Linear layers of these sizes with a ReLU between any two, drawn from torch's current random state.

    >>> [tuple(p.shape) for p in mlp(3, 5, 2).parameters()]
    [(5, 3), (5,), (2, 5), (2,)]
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ManyHeads(MultiTaskModule):
    """A body that all tasks share, and a linear head for each of them. Needs task labels."""

    def __init__(self, body: nn.Module, heads: MultiHeadClassifier) -> None:
        super().__init__()
        self.body, self.heads = body, heads

    def forward(self, x: Float[Tensor, "n ..."], task_labels: Int[Tensor, "n"] | int | None) -> Float[Tensor, "n C"]:
        return self.heads(self.body(x), task_labels)


def many_heads(body: nn.Module, features: int, outputs: int, tasks: int = 1) -> ManyHeads:
    """A network with heads of so many outputs each, for the task labels 0, 1, ..., tasks − 1.

    None of these is drawn when it is first met, in training or in evaluation, so measuring a task before it is learned
    changes nothing. Heads of further tasks are drawn by Avalanche as the tasks come.
    """
    heads = MultiHeadClassifier(features, outputs, masking=False)  # brings that of task 0
    for task in range(1, tasks):
        heads.classifiers[str(task)] = IncrementalClassifier(features, outputs, masking=False, auto_adapt=False)
    return ManyHeads(body, heads)
