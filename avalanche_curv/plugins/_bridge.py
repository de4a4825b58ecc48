"""What plugins and metrics read of an Avalanche strategy; no other module reads a strategy's internals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import BaseSGDPlugin
from avalanche.models import avalanche_forward
from avalanche.models.utils import is_multi_task_module
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from avalanche.training.templates.problem_type import SupervisedProblem
from avalanche.training.templates.update_type import MetaUpdate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from avalanche_curv.core.curvature.base import NonFiniteCurvatureError
from avalanche_curv.core.nested import Nested, examples, leaves, mapped
from avalanche_curv.core.options import check_whole
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import CountedBatches, random_part, untouched_randomness
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import convention_of, logits
from avalanche_curv.core.risk.frozen import keep_what_trains, unwrapped
from avalanche_curv.core.risk.labelled import inputs_of, is_labelled
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.preflight import check_batch
from avalanche_curv.core.risk.selection import Selection
from avalanche_curv.plugins._adapters import SingleTask, check_same_outputs, forward_of

IN_MEMORY_BYTES = 2**30  # data sets up to this size are loaded once, larger ones at every pass


@dataclass(frozen=True)
class LoadedBatches(CountedBatches):
    """(inputs, targets) of a data set, or mappings with `labels`, loaded anew at every pass and in the same order."""

    dataset: Any
    size: int

    @property
    def examples(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        for batch in loader(self.dataset, self.size):
            yield _without_attributes(self.dataset, batch) if isinstance(batch, Mapping) else (batch[0], batch[1])


def _without_attributes(dataset: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what Avalanche adds to each example, such as task labels, which the model does not take."""
    added = {*getattr(dataset, "_data_attributes", ())} - {"labels"}
    return {name: part for name, part in batch.items() if name not in added}


class TaskEnds:
    """Decides whether an experience ends a task; `here(strategy)` is to be called once at the end of each.

    Every experience ends a task, except in an online stream, where the last sub-experience of a task does: also where
    the stream hides it from the learner, which is to ask `tells_tasks` first. Sub-experiences are counted, because
    Avalanche does not mark the last one where they are of equal size.
    """

    def __init__(self) -> None:
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        """How much of the current task was seen."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._seen = check_whole("seen", state["seen"])

    def here(self, strategy: Any) -> bool:
        experience = strategy.experience
        if not isinstance(experience, OnlineCLExperience):
            return True
        experience = experience.logging()
        self._seen = 1 if experience.is_first_subexp else self._seen + 1
        return bool(experience.is_last_subexp) or self._seen == experience.sub_stream_length


def tells_tasks(strategy: Any) -> bool:
    """Whether the ends of tasks are known: not in an online stream that hides them."""
    experience = strategy.experience
    return not isinstance(experience, OnlineCLExperience) or bool(experience.access_task_boundaries)


def updates_of(strategy: Any) -> int:
    """The number of updates that the current experience takes, without what plugins make of its batches."""
    batches = -(-len(strategy.experience.dataset) // strategy.train_mb_size)
    return strategy.train_epochs * batches


FIRST = 256  # examples that are looked at before an experience is trained
REFUSALS = (TypeError, ValueError, MemoryError, NonFiniteCurvatureError)


def told_data(experience: Any) -> Any:
    """The examples without training augmentation that a learner may look at: all of a task that an online stream splits
    with known boundaries, and of one that hides them the part alone."""
    hidden = isinstance(experience, OnlineCLExperience) and not experience.access_task_boundaries
    return experience.dataset.eval() if hidden else data_of(experience)


def data_of(experience: Any) -> Any:
    """The examples of an experience without training augmentation; of a part that an online stream gives, those of the
    whole task, which metrics may know. Raises ValueError where there is no task, since tasks overlap."""
    if not isinstance(experience, OnlineCLExperience):
        return experience.dataset.eval()
    whole = experience.logging().origin_experience
    if whole is None:
        raise ValueError(
            "This online stream has parts that belong to no task, of which past tasks could be measured. Leave this "
            "metric out, or split tasks one after another with split_online_stream."
        )
    return whole.dataset.eval()


def preflight(
    strategy: Any,
    trial: Callable[[EmpiricalRisk], object],
    selection: Selection = Selection(),  # noqa: B008
    data: Callable[[Any], Any] = data_of,
) -> None:
    """To be called before the first step of an experience: raises what would keep its loss from being remembered,
    measured or projected at its end. `trial` does that to the risk of a few examples of its first batch, over the
    parameters that `selection` takes; `data` takes the examples from the experience.

    In a task that an online stream splits it looks at the first part only. What the past holds of parameters that were
    frozen until now is kept apart from them.
    """
    keep_what_trains(strategy.model)
    experience = strategy.experience
    if tells_tasks(strategy) and not getattr(experience, "is_first_subexp", True):
        return
    try:
        size = min(FIRST, int(strategy.train_mb_size), len(data(experience)))
        risk = current_risk(strategy, size, range(size), selection, data)
        check_trained_loss(strategy)
        trial(risk.trial())
    except Exception as error:
        kind = next((kind for kind in REFUSALS if isinstance(error, kind)), RuntimeError)
        text = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
        raise kind(f"Experience {current_number(strategy)}: {text} Nothing was trained on it yet.") from error


STEPS_TO_THE_LOSS = ("_unpack_minibatch", "mb_x", "mb_y", "mb_task_id", "forward", "criterion")


def check_trained_loss(strategy: Any) -> None:
    """Raises TypeError where a strategy trains another loss of the current examples than its criterion of its model's
    outputs, which is what is remembered of them. To be called before the first step of an experience.

    A strategy may do what it likes in the steps to its loss: of the first examples, in eval mode, the value and the
    gradient are compared. One that takes all those steps as Avalanche's templates do is not run. Terms that a plugin or
    a training loop adds, such as those of replayed examples, do not count. The strategy, its model and the random
    states are left as found.
    """
    kind = type(strategy)
    own = [
        name
        for name in STEPS_TO_THE_LOSS
        if name in vars(strategy) or getattr(kind, name, None) is not getattr(SupervisedProblem, name)
    ]
    if not own:
        return
    try:
        trained, pictured, tolerance = _losses_with_gradients(strategy)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise TypeError(
            f"{kind.__name__} has {', '.join(own)} of its own, and its loss cannot be compared with what would be "
            f"remembered, its criterion of the model's outputs: {type(error).__name__}: {error}. {_AS_IT_TRAINS}"
        ) from error
    if not all(_alike(*parts, tolerance) for parts in ((trained[:1], pictured[:1]), (trained[1:], pictured[1:]))):
        raise TypeError(
            f"{kind.__name__} has {', '.join(own)} of its own and trains another loss than would be remembered: of the "
            f"first examples {trained[0]:.6g} with a gradient of length {trained[1:].norm():.6g}; expected those of "
            f"{type(strategy._criterion).__name__} of the model's outputs, {pictured[0]:.6g} and "
            f"{pictured[1:].norm():.6g}. {_AS_IT_TRAINS}"
        )


_AS_IT_TRAINS = (
    "Let the model do what is done to inputs and outputs (scaling, a "
    "temperature, a mask), put a factor into the learning rate, and let a plugin's before_backward add further terms."
)


def _losses_with_gradients(strategy: Any) -> tuple[Tensor, Tensor, float]:
    """The loss of the first examples as the strategy computes it, and its criterion of its model's outputs, each
    followed by its gradient; and by how much of their size rounding may part them."""
    dataset, found = told_data(strategy.experience), dict(vars(strategy))
    first = dataset.subset(range(min(len(dataset), 4)))
    with untouched_randomness(), evaluating(strategy.model), torch.enable_grad():
        batch = next(iter(loader(first, len(first))))
        outputs, targets = _outputs_and_targets(strategy, *_parts(first, batch))
        pictured = strategy._criterion(outputs, targets)
        try:
            strategy.mbatch = batch if isinstance(batch, Mapping) else list(batch)
            strategy._unpack_minibatch()
            strategy.mb_output = strategy.forward()
            trained = strategy.criterion()
            half = getattr(strategy.mb_output, "dtype", None) in (torch.float16, torch.bfloat16)
        finally:
            vars(strategy).clear()
            vars(strategy).update(found)
        model, tolerance = strategy.model, 0.02 if half else 1e-3
        return _with_gradient(trained, model), _with_gradient(pictured, model), tolerance


def _with_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    free = [p for p in model.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss.sum(), free, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1).double() for part in (loss.detach().sum(), *parts)])


def _alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * torch.maximum(a.norm(), b.norm()) + 1e-6)


def check_backward(strategy: Any) -> None:
    """Raises TypeError for a strategy whose training never comes to `before_backward`, where penalties are added."""
    if isinstance(strategy, MetaUpdate):
        raise TypeError(
            f"{type(strategy).__name__} learns by meta-updates, which never call before_backward, so that a penalty "
            "would do nothing. Take strength 0 to measure only, or a strategy that trains on strategy.loss."
        )


def adds_beside_the_loss(strategy: Any, plugin: Any) -> bool:
    """Whether what `plugin` adds to the gradients after the backward pass trains as a term of the loss would: the loop
    and the backward pass are Avalanche's, which differentiate `strategy.loss` once and as it is, and nothing else acts
    in between: no other plugin, on the loss after this one has seen it or on the gradients before, and no hook of a
    parameter on its gradient."""
    kind, plugins = type(strategy), list(strategy.plugins)
    loop = next((one for one in kind.__mro__ if "training_epoch" in vars(one)), kind)
    plain = getattr(kind, "backward", None) is BaseSGDTemplate.backward and loop.__module__.startswith("avalanche.")
    if not plain or not vars(strategy).keys().isdisjoint({"backward", "training_epoch"}) or plugin not in plugins:
        return False
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in strategy.model.parameters()):
        return False
    place = plugins.index(plugin)
    earlier = any(_acts(other, "after_backward") for other in plugins[:place])
    return not earlier and not any(_acts(other, "before_backward") for other in plugins[place + 1 :])


def _acts(plugin: Any, hook: str) -> bool:
    """Whether a plugin does something in a hook; metrics, which the evaluator calls there, change nothing."""
    if isinstance(plugin, EvaluationPlugin):
        return False
    own = vars(plugin).get(hook, getattr(type(plugin), hook, None))
    return own is not None and own is not getattr(BaseSGDPlugin, hook)


def current_space(strategy: Any, selection: Selection = Selection()) -> ParameterSpace:  # noqa: B008  a frozen value
    """The trainable parameters of the strategy's model, or those that `selection` takes into the space of a risk.
    Raises ValueError for a selector that fits none."""
    selection.check(strategy.model)
    return ParameterSpace.of_parameters(strategy.model, selection.in_space(strategy.model))


def current_itemsize(strategy: Any) -> int:
    """Bytes of one number of the model's curvature: those of its parameters, float32 for half precision."""
    return max(4, *(p.element_size() for p in strategy.model.parameters()))


def current_number(strategy: Any) -> int:
    """How many experiences were trained before this one."""
    return strategy.clock.train_exp_counter


def current_risk(
    strategy: Any,
    batch_size: int,
    indices: Sequence[int] | None = None,
    selection: Selection = Selection(),  # noqa: B008
    data: Callable[[Any], Any] = data_of,
) -> EmpiricalRisk:
    """The risk of the current experience, or of its examples at `indices`, frozen at the current parameters, over those
    of them that `selection` takes. `data` takes the examples from the experience.

    Raises ValueError for an empty experience and for several task labels in one experience of a multi-task model.
    """
    check_experience(strategy)
    dataset = data(strategy.experience)
    with untouched_randomness():
        model = unwrapped(strategy.model)
        forward = forward_of(model, dataset, current_number(strategy))
        batches = _batches(dataset if indices is None else dataset.subset(indices), batch_size)
        risk = EmpiricalRisk.snapshot(
            model, strategy._criterion, batches, forward=forward, include=selection.include, exclude=selection.exclude
        )
        if isinstance(forward, SingleTask):
            check_same_outputs(risk, forward.task)
    return risk


def current_part(
    strategy: Any, fraction: float, seed: int, number: int, selection: Selection = Selection()  # noqa: B008
) -> EmpiricalRisk:
    """The risk of the part of the current experience that is kept of experience `number`, as `part_of` draws it from
    the whole; no other example is loaded."""
    if fraction == 1:
        return current_risk(strategy, batch_size=256, selection=selection)
    size = len(data_of(strategy.experience))
    part = random_part(size, fraction, part_seed(seed, number)).tolist() if size else []
    return current_risk(strategy, max(1, len(part)), part, selection)


def place_in_stream(experience: Any, default: int) -> int:
    """The number of an experience in the stream it comes from, also where training starts later or leaves some out;
    `default` where the experience has none."""
    online = isinstance(experience, OnlineCLExperience)
    own = experience.logging().origin_experience if online else experience
    place = getattr(own, "current_experience", None)
    return default if place is None else place


def check_experience(strategy: Any) -> None:
    """Raises ValueError for an experience without examples, and for several task labels before a multi-task model."""
    if len(strategy.experience.dataset) == 0:
        raise ValueError(
            f"Experience {current_number(strategy)} holds no examples, so it has no loss to remember. "
            "Remove it from the stream."
        )
    forward_of(unwrapped(strategy.model), told_data(strategy.experience), current_number(strategy))


def loader(dataset: Any, batch_size: int) -> DataLoader:
    """Batches in order; a generator of its own keeps the global random state as it is."""
    collate = getattr(dataset, "collate_fn", None)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=torch.Generator())


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


def correct(strategy: Any, batch: tuple[Nested, Tensor, Tensor]) -> tuple[int, int]:
    """Returns (n, N): of the N examples of a batch (inputs, targets, task labels), the model classifies n correctly."""
    with evaluating(strategy.model):
        outputs, targets = _outputs_and_targets(strategy, *batch)
    return int((outputs.argmax(1) == targets).sum()), len(targets)


def _outputs_and_targets(strategy: Any, inputs: Nested, targets: Tensor, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of the model of a strategy, and the targets, as its criterion takes both."""
    inputs, targets, tasks = mapped(lambda tensor: tensor.to(strategy.device), (inputs, targets, tasks))
    model = unwrapped(strategy.model)
    if is_multi_task_module(model) or isinstance(inputs, Tensor):
        return logits(avalanche_forward(strategy.model, inputs, tasks)), targets
    labelled = isinstance(inputs, Mapping)
    convention = convention_of(model, labelled=labelled)
    taken = inputs_of(model, {**inputs, "labels": targets}) if labelled else inputs
    return convention(strategy.model, taken), convention.targets(targets)


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


def predicted(strategy: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """(predicted classes, classes, task labels) of the batch that is being evaluated, labels as in `classes_of`; None
    where outputs are no scores of classes."""
    outputs, targets = strategy.mb_output, strategy.mb_y
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
        return None
    told = is_multi_task_module(unwrapped(strategy.model)) and len(strategy.mbatch) > 2
    return outputs.argmax(1), targets, strategy.mbatch[-1] if told else torch.zeros_like(targets)


def collected(dataset: Any, indices: list[int]) -> tuple[Nested, Tensor, Tensor]:
    """The examples at `indices` as one batch (inputs, targets, task labels); label 0 where the data carry none."""
    part = dataset.subset(indices)
    with untouched_randomness():
        batch = next(iter(loader(part, len(indices))))
    return _parts(part, batch)


def _parts(dataset: Any, batch: Any) -> tuple[Nested, Tensor, Tensor]:
    """(inputs, targets, task labels) of a batch of a data set; of a mapping, the rest, `labels` and 0."""
    if is_labelled(batch):
        rest = _without_attributes(dataset, batch)
        targets = rest.pop("labels")
        return rest, targets, torch.zeros(len(targets), dtype=torch.long)
    tasks = batch[-1] if len(batch) > 2 else torch.zeros(examples(batch[1]), dtype=torch.long)
    return batch[0], batch[1], tasks


def _batches(dataset: Any, size: int) -> Any:
    batches = LoadedBatches(dataset, size)
    first = next(iter(batches))
    if not is_labelled(first):
        check_batch(first)
    fits = sum(part.nbytes for part in leaves(first)) / examples(first) * len(dataset) <= IN_MEMORY_BYTES
    return tuple(batches) if fits else batches
