"""The heads of a network: one for all experiences, or one for each task."""

from __future__ import annotations

from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from jaxtyping import Float, Int
from torch import Tensor, nn


def one_head(body: nn.Sequential, features: int, outputs: int) -> nn.Sequential:
    """A linear head with all outputs from the start."""
    return nn.Sequential(*body, nn.Linear(features, outputs))


class ManyHeads(MultiTaskModule):
    """A body that all tasks share, and a linear head for each of them.

    All heads are there from the start: none is drawn when it is first met, in training or in evaluation, so measuring a
    task before it is learned changes nothing. Needs task labels.
    """

    def __init__(self, body: nn.Module, heads: MultiHeadClassifier) -> None:
        super().__init__()
        self.body, self.heads = body, heads

    def forward(self, x: Float[Tensor, "n ..."], task_labels: Int[Tensor, "n"] | int | None) -> Float[Tensor, "n C"]:
        return self.heads(self.body(x), task_labels)


def many_heads(body: nn.Module, features: int, outputs: int, tasks: int) -> ManyHeads:
    """So many heads of so many outputs each, for the task labels 0, 1, ..."""
    heads = MultiHeadClassifier(features, outputs, masking=False)  # brings that of task 0
    for task in range(1, tasks):
        heads.classifiers[str(task)] = IncrementalClassifier(features, outputs, masking=False, auto_adapt=False)
    return ManyHeads(body, heads)
