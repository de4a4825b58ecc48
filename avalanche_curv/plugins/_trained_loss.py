"""Whether a strategy trains the loss that is remembered of it, and a penalty beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from avalanche.core import BaseSGDPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates.base_sgd import BaseSGDTemplate
from avalanche.training.templates.problem_type import SupervisedProblem
from avalanche.training.templates.update_type import MetaUpdate
from torch import Tensor, nn

from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.plugins._batches import loader, parts_of
from avalanche_curv.plugins._outputs import evaluating, outputs_and_targets
from avalanche_curv.plugins._tasks import told_data

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
        outputs, targets = outputs_and_targets(strategy, *parts_of(first, batch))
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
