"""What plugins and metrics read of an Avalanche strategy; no other module reads a strategy's internals."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.models import MultiTaskModule, TrainEvalModel, avalanche_forward
from avalanche.models.utils import is_multi_task_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.core.risk.losses import ExampleLoss, example_loss
from avalanche_curv.core.risk.parameters import ParameterSpace

IN_MEMORY_BYTES = 2**30  # data sets up to this size are loaded once, larger ones at every pass


@dataclass(frozen=True)
class LoadedBatches:
    """(inputs, targets) of a data set, loaded anew at every pass and in the same order."""

    dataset: Any
    size: int

    @property
    def examples(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(loader(self.dataset, self.size))
        for _ in range(len(batches)):
            with untouched_randomness():
                batch = next(batches)
            yield batch[0], batch[1]


@dataclass(frozen=True)
class SingleTask:
    """Binds the task label of an experience, so that a multi-task model maps inputs alone to outputs."""

    task: int

    def __call__(self, module: nn.Module) -> nn.Module:
        return _OneTask(module, self.task)


class _OneTask(nn.Module):
    """A multi-task model called with one integer label: the same outputs as with a tensor of labels, which Avalanche
    pads with zero logits up to the largest class known, but free of the in-place writes that `vmap` cannot follow."""

    def __init__(self, module: nn.Module, task: int) -> None:
        super().__init__()
        self.module, self.task = module, task
        splitting = (m for m in module.modules() if type(m).forward is MultiTaskModule.forward)
        self.width = getattr(next(splitting, None), "max_class_label", 0)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.module(inputs, self.task)
        return F.pad(outputs, (0, max(0, self.width - outputs.shape[1])))


class _Trained(nn.Module):
    """A `TrainEvalModel` as it is trained, also in eval mode: its loss is that of the classifier for training, and not
    of the one it is evaluated with (nearest class means, FeCAM), which has no loss."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        module: Any = self.module
        return module.train_classifier(module.feature_extractor(inputs))


class TaskEnds:
    """Decides whether an experience ends a task; `here(strategy)` is to be called once at the end of each.

    Every experience ends a task, except in an online stream with known task boundaries, where the last sub-experience
    of a task does. Sub-experiences are counted, because Avalanche does not mark the last one where they are of equal
    size.
    """

    def __init__(self) -> None:
        self._seen = 0

    def here(self, strategy: Any) -> bool:
        experience = strategy.experience
        if not isinstance(experience, OnlineCLExperience) or not experience.access_task_boundaries:
            return True
        self._seen = 1 if experience.is_first_subexp else self._seen + 1
        return bool(experience.is_last_subexp) or self._seen == experience.sub_stream_length


def tells_tasks(strategy: Any) -> bool:
    """Whether the ends of tasks are known: not in an online stream that hides them."""
    experience = strategy.experience
    return not isinstance(experience, OnlineCLExperience) or bool(experience.access_task_boundaries)


def check_criterion(strategy: Any, curvature: Curvature) -> None:
    """Raises TypeError for a criterion without a per-example form, ValueError for one that `curvature` does not fit."""
    curvature.check_loss(loss_of(strategy))


def loss_of(strategy: Any) -> ExampleLoss:
    """The strategy's criterion as a loss of single examples. Raises TypeError where no such form is known."""
    return example_loss(strategy._criterion)


def current_space(strategy: Any) -> ParameterSpace:
    """The trainable parameters of the strategy's model."""
    return ParameterSpace.of(strategy.model)


def current_itemsize(strategy: Any) -> int:
    """Bytes of one number of the model's curvature: those of its parameters, float32 for half precision."""
    return max(4, *(p.element_size() for p in strategy.model.parameters() if p.requires_grad))


def current_number(strategy: Any) -> int:
    """How many experiences were trained before this one."""
    return strategy.clock.train_exp_counter


def data_of(experience: Any) -> Any:
    """The examples of an experience without training augmentation; for the end of a task split online, all of it."""
    if isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries:
        experience = experience.origin_experience
    return experience.dataset.eval()


def current_risk(strategy: Any, batch_size: int, indices: Sequence[int] | None = None) -> EmpiricalRisk:
    """The risk of the current experience, or of its examples at `indices`, frozen at the current parameters.

    Raises ValueError for an empty experience and for several task labels in one experience of a multi-task model.
    """
    check_experience(strategy)
    dataset = data_of(strategy.experience)
    with untouched_randomness():
        model = unwrapped(strategy.model)
        adapter = _adapter(model, dataset, current_number(strategy))
        batches = _batches(dataset if indices is None else dataset.subset(indices), batch_size)
        risk = EmpiricalRisk.snapshot(model, strategy._criterion, batches, adapter=adapter)
        if isinstance(adapter, SingleTask):
            _check_same_outputs(risk, adapter.task)
    return risk


def place_in_stream(experience: Any, default: int) -> int:
    """The number of an experience in the stream it comes from, also where training starts later or leaves some out;
    `default` where the experience has none."""
    own = getattr(experience, "origin_experience", experience)
    place = getattr(own, "current_experience", None)
    return default if place is None else place


def check_experience(strategy: Any) -> None:
    """Raises ValueError for an experience without examples, and for several task labels before a multi-task model."""
    if len(strategy.experience.dataset) == 0:
        raise ValueError(
            f"Experience {current_number(strategy)} holds no examples, so it has no loss to remember. "
            "Remove it from the stream."
        )
    _adapter(unwrapped(strategy.model), data_of(strategy.experience), current_number(strategy))


def loader(dataset: Any, batch_size: int) -> DataLoader:
    """Batches in order; a generator of its own keeps the global random state as it is."""
    collate = getattr(dataset, "collate_fn", None)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restores the random states of torch, numpy and Python afterwards, whatever a data set's transforms draw."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  the legacy state is the one transforms use
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


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


def correct(strategy: Any, batch: tuple[Tensor, ...]) -> tuple[int, int]:
    """Returns (n, N): of the N examples of a batch (inputs, targets, task labels), the model classifies n correctly."""
    inputs, targets, tasks = (part.to(strategy.device) for part in batch)
    with evaluating(strategy.model):
        outputs = avalanche_forward(strategy.model, inputs, tasks)
    return int((outputs.argmax(1) == targets).sum()), len(targets)


def collected(dataset: Any, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The examples at `indices` as one batch (inputs, targets, task labels); label 0 where the data carry none."""
    part = dataset.subset(indices)
    with untouched_randomness():
        batch = next(iter(loader(part, len(indices))))
    tasks = batch[-1] if len(batch) > 2 else torch.zeros(len(indices), dtype=torch.long)
    return batch[0], batch[1], tasks


def _batches(dataset: Any, size: int) -> Any:
    batches = LoadedBatches(dataset, size)
    first = next(iter(batches))[0]
    fits = first.nbytes / len(first) * len(dataset) <= IN_MEMORY_BYTES
    return tuple(batches) if fits else batches


def _adapter(model: nn.Module, dataset: Any, number: int) -> Callable[[nn.Module], nn.Module] | None:
    if isinstance(model, TrainEvalModel):
        return _Trained
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


def _check_same_outputs(risk: EmpiricalRisk, task: int) -> None:
    inputs, _ = next(iter(risk))
    with torch.no_grad():
        labels = torch.full((len(inputs),), task, device=inputs.device)
        expected, got = avalanche_forward(risk.base, inputs, labels), risk.model(inputs)
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"{type(risk.base).__name__} gives other outputs for the integer task label {task} than for a tensor "
            "of it, so its past loss cannot be frozen. Let forward() treat both alike, as MultiHeadClassifier does."
        )
