"""What makes an Avalanche model a function of inputs alone, whose loss can be remembered: the task label of an
experience bound to it, or the classifier that is trained and not the one that evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models import MultiTaskModule, TrainEvalModel, avalanche_forward
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import Forward
from avalanche_curv.core.state import Storable


def forward_of(model: nn.Module, dataset: Any, number: int) -> Forward | None:
    """How `model` is called as it is trained on the examples of experience `number`; None where inputs are enough.
    Raises ValueError for several task labels before a multi-task model, and for a model with a `TrainEvalModel` inside.
    """
    if isinstance(model, TrainEvalModel):
        return AsTrained()
    if any(isinstance(module, TrainEvalModel) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} holds a TrainEvalModel, which is another function in training than in eval mode: "
            "it is not known which of the two is trained here. Let the TrainEvalModel be the strategy's model."
        )
    if not is_multi_task_module(model):
        return None
    tasks = sorted({int(task) for task in dataset.targets_task_labels})
    if len(tasks) > 1:
        raise ValueError(
            f"Experience {number} carries the task labels {tasks}, but the past loss of a multi-task model is kept by "
            "task. Give each task an experience of its own."
        )
    return SingleTask(tasks[0])


def check_same_outputs(risk: EmpiricalRisk, task: int) -> None:
    """Raises ValueError where a multi-task model gives other outputs for the integer label that `SingleTask` binds than
    for a tensor of it."""
    inputs, targets = next(iter(risk))
    with torch.no_grad():
        labels = torch.full((len(targets),), task, device=targets.device)
        expected, got = avalanche_forward(risk.base, inputs, labels), risk.model(inputs)
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{type(risk.base).__name__} gives other outputs for the integer task label {task} than for a tensor "
            "of it, so its past loss cannot be frozen. Let forward() treat both alike, as MultiHeadClassifier does."
        )


@dataclass(frozen=True)
class SingleTask(Storable):
    """A multi-task model called with the one integer label of an experience: the same outputs as with a tensor of
    labels, which Avalanche pads with zero logits up to the largest class known, but free of the in-place writes that
    `vmap` cannot follow."""

    task: int

    def __call__(self, model: nn.Module, inputs: Tensor) -> Tensor:
        outputs = model(inputs, self.task)
        splitting = (m for m in model.modules() if type(m).forward is MultiTaskModule.forward)
        return F.pad(outputs, (0, max(0, getattr(next(splitting, None), "max_class_label", 0) - outputs.shape[1])))


@dataclass(frozen=True)
class AsTrained(Storable):
    """A `TrainEvalModel` as it is trained, also in eval mode: its loss is that of the classifier for training, and not
    of the one it is evaluated with (nearest class means, FeCAM), which has no loss."""

    def __call__(self, model: Any, inputs: Tensor) -> Tensor:
        return model.train_classifier(model.feature_extractor(inputs))
