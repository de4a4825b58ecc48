"""What the model of a strategy gives for a batch, and which classes it is right about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from avalanche.models import avalanche_forward
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn

from avalanche_curv.core.nested import Nested, mapped
from avalanche_curv.core.risk.forward import convention_of, logits
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.core.risk.labelled import inputs_of


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's training flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def outputs_and_targets(strategy: Any, inputs: Nested, targets: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of the model of a strategy, and the targets, as its criterion takes both."""
    inputs, targets, tasks = mapped(lambda tensor: tensor.to(strategy.device), (inputs, targets, tasks))
    model = unwrapped(strategy.model)
    if is_multi_task_module(model) or isinstance(inputs, Tensor):
        return logits(avalanche_forward(strategy.model, inputs, tasks)), targets
    labelled = isinstance(inputs, Mapping)
    convention = convention_of(model, labelled=labelled)
    taken = inputs_of(model, {**inputs, "labels": targets}) if labelled else inputs
    return convention(strategy.model, taken), convention.targets(targets)


def correct(strategy: Any, batch: tuple[Nested, Tensor, Tensor]) -> tuple[int, int]:
    """Returns (n, N): of the N examples of a batch (inputs, targets, task labels), the model classifies n correctly."""
    with evaluating(strategy.model):
        outputs, targets = outputs_and_targets(strategy, *batch)
    return int((outputs.argmax(1) == targets).sum()), len(targets)


def predicted(strategy: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """(predicted classes, classes, task labels) of the batch that is being evaluated, labels as in `classes_of`; None
    where outputs are no scores of classes."""
    outputs, targets = strategy.mb_output, strategy.mb_y
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        return None
    told = is_multi_task_module(unwrapped(strategy.model)) and len(strategy.mbatch) > 2
    return outputs.argmax(1), targets, strategy.mbatch[-1] if told else torch.zeros_like(targets)


def classes_of(strategy: Any) -> set[tuple[int, int]]:
    """The (task label, class) of the current experience; label 0 before a model that is not told the task. Empty where
    targets are no classes."""
    experience, dataset = strategy.experience, strategy.experience.dataset
    classes = getattr(experience, "classes_in_this_experience", None)
    if classes is None:
        classes = {target for target in getattr(dataset, "targets", ()) if isinstance(target, int)}
    told = is_multi_task_module(unwrapped(strategy.model))
    tasks = {int(task) for task in dataset.targets_task_labels} if told else {0}
    return {(task, int(known)) for task in tasks for known in classes}
