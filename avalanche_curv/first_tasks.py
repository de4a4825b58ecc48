"""λ chosen on the first tasks of a stream, by held-out examples that are needed only there."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.curvature.base import NonFiniteCurvatureError
from avalanche_curv.core.options import check_number
from avalanche_curv.core.quadratic.stability import UnstablePenaltyError, suggest_strength
from avalanche_curv.metrics.training_accuracy import training_accuracy
from avalanche_curv.plugins import CurvatureEWCPlugin

LOG = logging.getLogger("avalanche_curv")
FIRST = 100.0  # the strength of the run from which others are suggested

S = TypeVar("S")


@dataclass(frozen=True)
class ChosenStrength(Generic[S]):
    """The `strength` that was best on the first tasks, the `strategy` that has learned them with it and goes on, and
    the `scores` of all that were tried: held-out accuracy, NaN where training diverged."""

    strength: float
    strategy: S
    scores: Mapping[float, float]

    @property
    def is_at_end(self) -> bool:
        """Whether none smaller, or none larger, was tried: one beyond may be better. 0 is the least there is, and one
        that is larger and diverged was tried."""
        return self.strength == max(self.scores) or self.strength == min(self.scores) != 0


def choose_strength(
    make: Callable[[float], S],
    tasks: Sequence[Any],
    held_out: Sequence[Any],
    *,
    strengths: Iterable[float] | None = None,
) -> ChosenStrength[S]:
    """Trains a new strategy on the first tasks at each strength, and returns the best on their held-out examples.

    `make(strength)` returns a new strategy with a `CurvatureEWCPlugin`, such as `CurvatureEWC`, of a new model; seed it
    there, so that the runs differ in the strength alone. `tasks` are its first k ≥ 2 training experiences (no penalty
    acts in the first), `held_out` as many with other examples of each, as Avalanche's
    `benchmark_with_validation_stream` makes. The score is the accuracy on these after the last of the k, averaged over
    them; of equal ones the smallest strength is taken. Without `strengths` they are 100, and the four that
    `suggest_strength` gives after that run. With n of them it costs n times the training of k tasks, instead of once.

        stream = benchmark_with_validation_stream(benchmark, validation_size=0.1)
        chosen = choose_strength(make, stream.train_stream[:3], stream.valid_stream[:3])
        chosen.strategy.train(stream.train_stream[3:])

    What comes later is not seen: a strength that keeps three tasks well may leave too little room for thirty. It warns
    where the best is the smallest or the largest that was tried (`ChosenStrength.is_at_end`), with what to try next.

    Raises ValueError for fewer than two tasks, for another number of held-out ones, for targets that are no classes,
    and where all strengths diverged; TypeError for a strategy without the plugin.
    """
    tasks, held_out = [*tasks], [*held_out]
    if len(tasks) < 2 or len(held_out) != len(tasks):
        raise ValueError(
            f"choose_strength takes at least two tasks, as no penalty acts in the first, and as many held out; got "
            f"{len(tasks)} and {len(held_out)}. Give train_stream[:3] and valid_stream[:3]."
        )
    if strengths is not None and not (strengths := [_checked(one) for one in strengths]):
        raise ValueError("choose_strength needs strengths to try; got none. Give (1, 10, 100), or leave them out.")
    scores: dict[float, float] = {}
    best: tuple[float, float, S] | None = None
    waiting, reason = [FIRST] if strengths is None else [*strengths], ""
    while waiting:
        strength = waiting.pop(0)
        strategy = make(strength)
        plugin = _plugin_of(strategy)
        scores[strength] = score = _score(strategy, tasks, held_out)
        LOG.info("Strength %g: accuracy %.4f on what is held out of %d tasks.", strength, score, len(tasks))
        if not math.isnan(score) and (best is None or (score, -strength) > (best[0], -best[1])):
            best = score, strength, strategy
        if strengths is None and len(scores) == 1 and plugin.past.model is not None:
            suggested = suggest_strength(plugin.past, strategy.optimizer, strategy.model)  # type: ignore[attr-defined]
            waiting, reason = [one for one in suggested.grid if one != FIRST], suggested.reason
    if best is None:
        raise ValueError(f"Training diverged at each strength of {[*scores]}. Lower the learning rate, or give others.")
    chosen = ChosenStrength(best[1], best[2], scores)
    if chosen.is_at_end:
        warnings.warn(_at_end(chosen, reason), UserWarning, stacklevel=outside())
    return chosen


def _at_end(chosen: ChosenStrength[Any], reason: str) -> str:
    """What to try next to a strength that none was beyond; `reason` is why those were tried, where they were suggested.
    """
    strength, why = chosen.strength, f" ({reason})" if reason else ""
    if len(chosen.scores) == 1:
        grid = (strength / 10, strength, 10 * strength) if strength else (1.0, 10.0, 100.0)
        said = f"Strength {strength:g} is the only one that was tried{why}, and was compared with none"
    elif strength == max(chosen.scores):
        grid = (strength, 10 * strength, 100 * strength) if strength else (1.0, 10.0, 100.0)
        said = f"The best strength, {strength:g}, is the largest that was tried{why}: a larger one may be better"
    else:
        grid = (strength / 100, strength / 10, strength)
        said = f"The best strength, {strength:g}, is the smallest that was tried{why}: a smaller one may be as good"
    return f"{said}. Try choose_strength(..., strengths=({', '.join(f'{one:g}' for one in grid)}))."


def _checked(strength: object) -> float:
    return check_number("strengths", strength, at_least=0, hint="Give numbers, such as (1, 10, 100).")


def _plugin_of(strategy: Any) -> CurvatureEWCPlugin:
    found = [one for one in getattr(strategy, "plugins", ()) if isinstance(one, CurvatureEWCPlugin)]
    if not found:
        raise TypeError(
            f"make must return a strategy with a CurvatureEWCPlugin; got {type(strategy).__name__}. Return "
            "CurvatureEWC(strength=strength, ...)."
        )
    return found[0]


def _score(strategy: Any, tasks: Sequence[Any], held_out: Sequence[Any]) -> float:
    """The held-out accuracy after these tasks, averaged over them; NaN where training diverged."""
    try:
        for task in tasks:
            strategy.train(task)
    except (NonFiniteCurvatureError, UnstablePenaltyError) as error:
        LOG.info("%s", error)
        return math.nan
    found = [training_accuracy(strategy, one) for one in held_out]
    if any(map(math.isnan, found)):
        raise ValueError("choose_strength compares accuracies, and these targets are no classes, or there are none.")
    return sum(found) / len(found)
