"""What works around each step of an optimiser, in any training loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Attachable(Protocol):
    """What can be attached to an optimiser."""

    def detach(self, attachment: Attachment) -> None:
        """Called after the hooks of `attachment` were removed."""


@dataclass(frozen=True, eq=False)
class Attachment:
    """The connection of a mitigator or regulariser to an optimiser and a model, as returned by `attach`."""

    owner: Attachable
    optimizer: weakref.ref[Optimizer]
    model: weakref.ref[nn.Module]
    hooks: tuple[Any, ...]

    @classmethod
    def around_steps(
        cls,
        owner: Attachable,
        optimizer: Optimizer,
        model: nn.Module,
        before: Callable[[Optimizer, int], Tensor | None],
        after: Callable[[Optimizer], None],
    ) -> Attachment:
        """Calls `before(optimizer, 0)` when the gradients of a step are there, and `after(optimizer)` when it is made.

        In a step with a closure `before` is called after each evaluation of it instead, with the number of that
        evaluation, counted from 1, and what it returns is added to the loss that the closure returns. Steps that a
        gradient scaler makes a fused optimiser skip are left out.
        """

        def first(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
            if closure is None:
                if not skips_step(optimizer):
                    before(optimizer, 0)
                return None
            evaluations = 0

            def followed() -> Any:
                nonlocal evaluations
                loss, evaluations = closure(), evaluations + 1
                added = before(optimizer, evaluations)
                return loss if loss is None or added is None else loss + added

            return args[:1], {**kwargs, "closure": followed}

        def last(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not skips_step(optimizer):
                after(optimizer)

        eager = torch.compiler.disable  # a compiled `step` is one graph between both hooks
        hooks = optimizer.register_step_pre_hook(eager(first)), optimizer.register_step_post_hook(eager(last))
        return cls(owner, weakref.ref(optimizer), weakref.ref(model), hooks)

    def remove(self) -> None:
        """Removes the hooks from the optimiser; a second call has no effect."""
        for hook in self.hooks:
            hook.remove()
        self.owner.detach(self)

    def check_model(self, model: nn.Module) -> None:
        """Raises RuntimeError for another model than the one it is attached for."""
        if self.model() is not model:
            raise RuntimeError(
                f"This {type(self.owner).__name__} is attached for another model. Make one for each model, or call "
                "remove() on what attach() returned."
            )

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def innermost(optimizer: Any) -> Any:
    """The optimiser inside what wraps it and keeps it under the attribute `optimizer`, as Accelerate and PyTorch
    Lightning do; the argument itself where nothing does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_attachable(optimizer: Any, model: Any) -> None:
    """Raises TypeError unless these are a torch optimiser and a module, in this order."""
    if not isinstance(optimizer, Optimizer) or not isinstance(model, nn.Module):
        given = f"{type(optimizer).__name__}, {type(model).__name__}"
        raise TypeError(f"attach(optimizer, model) takes a torch optimiser and a module; got {given}.")


def check_minimises(owner: object, optimizer: Optimizer) -> None:
    """Raises ValueError for an optimiser with `maximize=True`, which would maximise the penalty of `owner` too."""
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            f"{type(owner).__name__} minimises its penalty, but the optimiser maximises. Minimise the negative loss."
        )


def stepped_by(*optimizers: Optimizer) -> set[int]:
    """The parameters that these optimisers step, by identity."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def skips_step(optimizer: Optimizer) -> bool:
    """Whether a fused optimiser skips this step, since a gradient scaler has found that gradients are not finite."""
    return bool(float(getattr(optimizer, "found_inf", 0.0)))
