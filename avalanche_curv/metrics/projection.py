"""How much of training goes into the protected space of an orthogonal projection, and how large that space is."""

from __future__ import annotations

import math
from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.evaluation.metric_results import MetricValue
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.projection import ProtectedSpace
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.plugins import OrthogonalProjectionPlugin, _bridge, _tasks

IN_TEXT = ("projection/step_leakage", "projection/free", "projection_experience/overlap",
           "projection_?/step_leakage", "projection_?/free", "projection_?_experience/overlap")  # fmt: skip
Copies = dict[str, dict[str, Tensor]]  # of the protected parameters by name, for each group of metrics


@known_arguments
def projection_metrics(*, every: int = 20) -> list[ScalarMetric]:
    """Metrics of the leakage of steps and of the drift into the protected space, its size, and the angles between
    tasks.

    Every n iterations of an experience in which something is protected, by U in all blocks together:

    - `projection/step_leakage` = ‖Δ Uᵀ U‖ / ‖Δ‖ of the step Δ, as corrected, and `projection/drift_leakage`, that
      of the drift θ − a from where the experience began: 0 but for rounding under `StepProjection()`, whereas
      `GradientProjection()` and `SequentialProjection()` leak. Rounding is that of the parameters: of a step of norm
      1e-3 some 1e-5 in float32, which does not add up in the drift. Δ is of the protected parameters, in the shapes
      they had at the end of the last task;
    - `projection/used` and `projection/free`, dimensions of the trainable parameters that are closed and open to steps;
      `projection/energy`, the part of past tasks' curvature that their own directions hold; `projection/bytes`, memory
      of the bases: as they were when the experience began.

    At the end of each experience, with what it needs itself, `projection_experience/{used,free,energy,bytes}`, and
    between its directions and those of all earlier ones (`/experience_k`: of the k-th, from 0) the principal angles
    α: `projection_experience/{smallest_angle,largest_angle}` in degrees, and `projection_experience/overlap`, the mean
    cos²α: 1 where the one span holds the other, 0 where they are orthogonal. Each block of a basis adds its own angles,
    and `max_rank` leaves those between what it keeps.

    For an MLP 784-400-400-10 with 20 directions over all parameters one measurement takes as long as a projected step,
    or two to three plain ones of batch 128; every=1 about doubles the cost of training, the default of 20 adds a tenth.
    Text loggers print `projection/{step_leakage,free}` and `projection_experience/overlap`; other loggers get all.

    They are read from the strategy's OrthogonalProjectionPlugin; with several, numbered `projection_1/...` and
    `projection_1_experience/...` and so on. A strategy without one emits nothing. Values that are not finite, such as
    the leakage of no step, are left out. Measuring leaves training bit-identical. Raises ValueError unless `every` is
    an integer of at least 1.
    """
    return [ProjectionMetric(every)]


class ProjectionMetric(ScalarMetric):
    """The values `projection...` of `projection_metrics`."""

    def __init__(self, every: int) -> None:
        super().__init__(every, IN_TEXT)
        self._task_ends = _tasks.TaskEnds()
        self._starts: Copies = {}  # at the start of the task
        self._before: Copies = {}  # before a step that is measured
        self._sizes: dict[str, dict[str, float]] = {}  # while something is protected

    def before_training_exp(self, strategy: Any) -> None:
        if not (self._starts and _goes_on(strategy.experience)):
            self._starts = _copies(strategy)
        self._sizes = {
            group: _sizes(space, _bridge.current_space(strategy)) for group, space in _protecting(strategy).items()
        }

    def before_update(self, strategy: Any) -> None:
        self._before = _copies(strategy) if self.due(strategy) else {}

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        if not self.due(strategy):
            return []
        values: dict[str, float] = {}
        for group, space in _protecting(strategy).items():
            now = space.values(strategy.model)
            leakage = {
                "step_leakage": space.leakage(now, self._before[group]),
                "drift_leakage": space.leakage(now, self._starts[group]),
            }
            values |= {f"{group}/{name}": value for name, value in (leakage | self._sizes[group]).items()}
        return self._published(strategy, values)

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        self._before, self._sizes = {}, {}
        if not self._task_ends.here(strategy):
            return []
        self._starts = {}
        values: dict[str, float] = {}
        for group, space in _spaces(strategy).items():
            found = _sizes(space, _bridge.current_space(strategy)) | _angles(space)
            values |= {f"{group}_experience/{name}": value for name, value in found.items()}
        return self._published(strategy, values)

    def _published(self, strategy: Any, values: dict[str, float]) -> list[MetricValue]:
        return self.publish(strategy, {name: value for name, value in values.items() if math.isfinite(value)})


def _spaces(strategy: Any) -> dict[str, ProtectedSpace]:
    """The protected space of each projection, by the group of its metrics."""
    found = [plugin.protected for plugin in strategy.plugins if isinstance(plugin, OrthogonalProjectionPlugin)]
    return {f"projection_{number}" if number else "projection": space for number, space in enumerate(found)}


def _protecting(strategy: Any) -> dict[str, ProtectedSpace]:
    return {group: space for group, space in _spaces(strategy).items() if not space.is_empty}


def _copies(strategy: Any) -> Copies:
    return {
        group: {name: value.clone() for name, value in space.values(strategy.model).items()}
        for group, space in _protecting(strategy).items()
    }


def _goes_on(experience: Any) -> bool:
    """Whether it is a later part of a task that is known to be split."""
    return isinstance(experience, OnlineCLExperience) and not experience.logging().is_first_subexp


def _sizes(protected: ProtectedSpace, trainable: ParameterSpace) -> dict[str, float]:
    used = protected.restricted(frozenset(trainable.names)).used
    return {
        "used": used,
        "free": trainable.size - used,
        "energy": protected.energy,
        "bytes": protected.nbytes,
    }


def _angles(protected: ProtectedSpace) -> dict[str, float]:
    """The angles between the newest task and all earlier ones together, and each of them."""
    newest = protected.experiences - 1
    found = {task: protected.angles(task, newest) for task in protected.tasks if task < newest}
    found = {task: angles for task, angles in found.items() if len(angles)}
    if not found:
        return {}
    values = _closeness(torch.cat(list(found.values())))
    for task, angles in found.items():
        values |= {f"{name}/experience_{task}": value for name, value in _closeness(angles).items()}
    return values


def _closeness(angles: Float[Tensor, "n"]) -> dict[str, float]:
    degrees = angles.rad2deg()
    return {
        "smallest_angle": float(degrees.min()),
        "largest_angle": float(degrees.max()),
        "overlap": float(angles.cos().square().mean()),
    }
