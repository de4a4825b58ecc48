"""The risk of the current experience of an Avalanche strategy, and whether it can be remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from avalanche_curv.core.curvature.base import NonFiniteCurvatureError
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part, untouched_randomness
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import keep_what_trains, unwrapped
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.selection import Selection
from avalanche_curv.plugins._adapters import SingleTask, check_same_outputs, forward_of
from avalanche_curv.plugins._batches import batches_of
from avalanche_curv.plugins._tasks import data_of, tells_tasks, told_data
from avalanche_curv.plugins._trained_loss import check_trained_loss

FIRST = 256  # examples that are looked at before an experience is trained
REFUSALS = (TypeError, ValueError, MemoryError, NonFiniteCurvatureError)


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


def check_once(plugin: object, strategy: Any) -> None:
    """Raises ValueError where a plugin is in the strategy twice, and would act twice at each step."""
    times = sum(one is plugin for one in strategy.plugins)
    if times > 1:
        raise ValueError(
            f"One {type(plugin).__name__} is in the plugins of the strategy {times} times. List it once, or make two."
        )


def check_experience(strategy: Any) -> None:
    """Raises ValueError for an experience without examples, and for several task labels before a multi-task model."""
    if len(strategy.experience.dataset) == 0:
        raise ValueError(
            f"Experience {current_number(strategy)} holds no examples, so it has no loss to remember. "
            "Remove it from the stream."
        )
    forward_of(unwrapped(strategy.model), told_data(strategy.experience), current_number(strategy))


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
        batches = batches_of(dataset if indices is None else dataset.subset(indices), batch_size)
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
