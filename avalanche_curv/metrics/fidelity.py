"""How wrong the quadratic picture of the past is, on any strategy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import TensorboardLogger, WandBLogger

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.curvature.hessian import Hessian
from avalanche_curv.core.fidelity.monitor import PastModels
from avalanche_curv.core.options import is_number
from avalanche_curv.core.quadratic.policies import Policy, part_of
from avalanche_curv.metrics._distance_figure import DistanceCurves
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.metrics.accuracy import TaskAccuracyMetric
from avalanche_curv.metrics.penalty import PenaltyMetric
from avalanche_curv.plugins import CurvatureEWCPlugin, _bridge


def fidelity_metrics(
    *,
    of: CurvatureEWCPlugin | None = None,
    curvature: Curvature | None = None,
    fraction: float | None = None,
    seed: int | None = None,
    every: int = 10,
    stream: Sequence[Any] | None = None,
) -> list[ScalarMetric]:
    """Fidelity of the quadratic picture of past loss, accuracy on old and new examples, and the penalty.

    A random `fraction` (0.1) of each experience's examples, drawn by `seed` (0), is stored. Two pictures of them are
    measured side by side, whatever the strategy trains with: `accumulate`, each experience at its own anchor, and
    `refresh`, all at the end of the newest experience. For each, without and with the linear term (`_linear`), the
    means of kappa, |kappa|, gamma, alpha and rho (see `core.fidelity.Fidelity`) are published, overall and by past
    experience, beside the `distance` ‖θ − anchor‖ that both forms share (see `PastPictures.distances`):

    - `fidelity/<picture>/<measure>[/experience_t]` every n iterations,
    - `fidelity_experience/...` at the end of each experience, before it becomes part of the past,
    - `fidelity_trajectory/...` then too: the average over all measured iterations so far,
    - `fidelity/kappa_against_distance` then too, where a logger draws: a figure of this experience's iterations.

    Besides come `accuracy/{stored,current_task,past_tasks}`, on `stream` if one is given (for instance
    `benchmark.test_stream`) and else on training examples, and `penalty/{raw,weighted}` of a CurvatureEWC.

    `of` takes the curvature from a CurvatureEWCPlugin, and fraction and seed from a policy of it that stores only part
    of the examples, where they are not given. Each experience is measured on the past function as frozen at its end
    (`accumulate`), or on that of the newest end (`refresh`), masks and padding of growing heads included. What growth
    alone changes is `growth/<picture>[/experience_t]`, before the first step: the loss of the model as it has grown
    less that of the frozen function, at the same parameters. Measuring draws no random numbers and leaves training
    bit-identical. Raises TypeError for a curvature without per-example form.

    >>> from avalanche_curv import GGN
    >>> [type(metric).__name__ for metric in fidelity_metrics(curvature=GGN(), every=5)]
    ['FidelityMetric', 'TaskAccuracyMetric', 'PenaltyMetric']
    """
    if of is not None:
        curvature = _of_single_examples(of.curvature) if curvature is None else curvature
        fraction = _stored_fraction(of.policy) if fraction is None else fraction
        seed = getattr(of.policy, "seed", None) if seed is None else seed
    fraction, seed = 0.1 if fraction is None else fraction, seed or 0
    return [
        FidelityMetric(every, Fisher() if curvature is None else curvature, fraction, seed),
        TaskAccuracyMetric(every, stream, fraction, seed),
        PenaltyMetric(every),
    ]


def _of_single_examples(curvature: Curvature) -> Curvature:
    """A Hessian made positive semi-definite as a whole is measured by the plain one, which single examples have."""
    return Hessian() if isinstance(curvature, Hessian) else curvature


def _stored_fraction(policy: Policy) -> float | None:
    fraction = getattr(policy, "fraction", 1.0)
    return fraction if fraction < 1 else None


class FidelityMetric(ScalarMetric):
    """See `fidelity_metrics`."""

    def __init__(self, every: int, curvature: Curvature, fraction: float, seed: int) -> None:
        super().__init__(every)
        if not (is_number(fraction) and 0 < fraction <= 1):
            raise ValueError(f"fraction must lie in (0, 1]; got {fraction}. 0.1 stores one example in ten.")
        self.fraction, self.seed = fraction, seed
        self.pictures = PastModels(curvature)
        self._task_ends = _bridge.TaskEnds()
        self.trajectory: defaultdict[str, _Mean] = defaultdict(_Mean)
        self._curves = DistanceCurves()
        self._begun = False  # the task, of which an online stream gives one part after another

    def before_training(self, strategy: Any) -> None:
        _bridge.check_criterion(strategy, self.pictures.curvature)

    def before_training_exp(self, strategy: Any) -> list[MetricValue]:
        if self._begun:
            return []
        self._begun = True
        return self._published(strategy, "growth", self.pictures.growth(strategy.model))

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        if not self.pictures.accumulate or not self.due(strategy):
            return []
        values = self.pictures.measure(strategy.model)
        for name, value in values.items():
            self.trajectory[name].add(value)
        self._curves.add(values)
        return self._published(strategy, "fidelity", values)

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        if not self._task_ends.here(strategy):
            return []
        self._begun = False
        published: list[MetricValue] = []
        if self.pictures.accumulate:
            published += self._published(strategy, "fidelity_experience", self.pictures.measure(strategy.model))
            means = {name: mean.value for name, mean in self.trajectory.items()}
            published += self._published(strategy, "fidelity_trajectory", means)
            published += self._figure(strategy)
        risk = _bridge.current_risk(strategy, batch_size=256)
        stored = part_of(risk, self.fraction, self.seed, len(self.pictures.accumulate))
        self.pictures = self.pictures.with_experience(stored)
        return published

    def _figure(self, strategy: Any) -> list[MetricValue]:
        """What was measured in this experience against distance, for loggers that draw."""
        number, curves = len(self.pictures.accumulate), self._curves
        self._curves = DistanceCurves()
        if not any(isinstance(logger, TensorboardLogger | WandBLogger) for logger in strategy.evaluator.loggers):
            return []
        figure = curves.figure(f"Error of the pictures of the past in experience {number}")
        name, step = "fidelity/kappa_against_distance", strategy.clock.train_iterations
        return [MetricValue(self, name, figure, step)] if figure is not None else []

    def _published(self, strategy: Any, group: str, values: dict[str, float]) -> list[MetricValue]:
        """Undefined values, such as a cosine with a zero gradient, are left out."""
        defined = {f"{group}/{name}": value for name, value in values.items() if not math.isnan(value)}
        return self.publish(strategy, defined)


class _Mean:
    """The mean of the defined values seen so far."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        if not math.isnan(value):
            self.total, self.count = self.total + value, self.count + 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan
