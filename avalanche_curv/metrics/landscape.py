"""The shape of the loss along training, on any strategy: of the current task, and of stored examples of past ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import TensorboardLogger, WandBLogger
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.landscape.alignment import alignment, curvature_drift
from avalanche_curv.core.landscape.landscape import WAYS, Landscape, check_options, landscape, moved
from avalanche_curv.core.landscape.spectrum import SpectrumMethod
from avalanche_curv.core.options import in_short, is_number
from avalanche_curv.core.quadratic.policies import part_of
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.metrics._spectrum_figure import logarithms, spectrum_figure
from avalanche_curv.metrics.gradients import GradientMetric
from avalanche_curv.plugins import _bridge


def landscape_metrics(
    *,
    curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
    fraction: float = 0.1,
    seed: int = 0,
    every: int = 100,
    k: int = 10,
    epsilon: float = 1e-2,
    ways: Sequence[SpectrumMethod] = WAYS,
) -> list[ScalarMetric]:
    """Sharpness and the like of the loss along training, how steps and drift lie to it, and the size of both gradients.

    Measured every n iterations, counted from the first of the experience, with {sharpness, trace, numerical_rank,
    effective_rank, energy, exact} as in `core.landscape.Landscape`:

    - `landscape/current/...`: a random `fraction` of the current experience, the model as it is;
    - `landscape/stored/...`: the same part of each past experience, on the past function as frozen at the newest end,
      at the current parameters;
    - `landscape/step/{alignment,leakage}` of the optimizer's step, and `landscape/drift/{alignment,leakage}` of θ − a,
      with the top k eigenvectors of the stored examples at the newest anchor a (`core.alignment.Alignment`);
    - `landscape/drift/{trace_ratio,overlap}`: the curvature of the stored examples now against that at the anchor;
    - `gradient/{task_norm,penalty_norm,cosine}` (see `GradientMetric`).

    While there is no past, the current experience at its start takes its place. At the end of each experience, before
    it becomes part of the past, come `landscape_experience/{current,stored,drift}/...` and, where a logger draws,
    `landscape/{current,stored}/spectrum`, a figure, and `.../log10_eigenvalues`, a histogram.

    `fraction` and `seed` choose the same examples as those of `fidelity_metrics`. `ways` says how spectra are computed,
    `exact` is 1 where that is exact. Undefined values are left out, and all of them where the curvature is not finite.
    Measuring draws no random numbers and leaves training bit-identical. Raises TypeError or ValueError for unusable
    options.

    >>> from avalanche_curv import GGN
    >>> [type(metric).__name__ for metric in landscape_metrics(curvature=GGN(), every=50)]
    ['LandscapeMetric', 'GradientMetric']
    """
    return [LandscapeMetric(every, curvature, fraction, seed, k, epsilon, ways), GradientMetric(every)]


class LandscapeMetric(ScalarMetric):
    """See `landscape_metrics`."""

    def __init__(
        self,
        every: int,
        curvature: Curvature,
        fraction: float,
        seed: int,
        k: int,
        epsilon: float,
        ways: Sequence[SpectrumMethod],
    ) -> None:
        super().__init__(every)
        if not (is_number(fraction) and 0 < fraction <= 1):
            raise ValueError(f"fraction must lie in (0, 1]; got {fraction}. 0.1 looks at one example in ten.")
        check_options(curvature, k, epsilon, ways)
        self.curvature, self.fraction, self.seed = curvature, fraction, seed
        self.k, self.epsilon, self.ways = k, epsilon, tuple(ways)
        self._task_ends = _bridge.TaskEnds()
        self._current: EmpiricalRisk | None = None  # as frozen at the start of the task
        self._stored: tuple[EmpiricalRisk, ...] = ()  # all as frozen at the end of the newest task
        self._before: Tensor | None = None  # the parameters before a step that is measured

    def before_training(self, strategy: Any) -> None:
        _bridge.check_criterion(strategy, self.curvature)

    def before_training_exp(self, strategy: Any) -> None:
        if self._current is None:
            risk = _bridge.current_risk(strategy, batch_size=256)
            self._current = part_of(risk, self.fraction, self.seed, len(self._stored))

    def before_update(self, strategy: Any) -> None:
        self._before = self._anchored[0].space.vector(strategy.model) if self.due(strategy) else None

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        if not self.due(strategy):
            return []
        return self._published(strategy, "landscape", self._measured(strategy))

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        self._before = None
        if not self._task_ends.here(strategy):
            return []
        found = self._measured(strategy)
        published = self._published(strategy, "landscape_experience", found) + self._drawn(strategy, found)
        newest = self._now(strategy)
        self._stored = (*(risk.at(newest) for risk in self._stored), newest)
        self._current = None
        self.__dict__.pop("_reference", None)
        return published

    @property
    def _anchored(self) -> tuple[EmpiricalRisk, ...]:
        """The examples, frozen at the anchor, that steps and drift are measured against."""
        return self._stored or ((self._current,) if self._current is not None else ())

    @cached_property
    def _reference(self) -> Landscape | None:
        """Their landscape there."""
        return self._landscape(self._anchored)

    def _now(self, strategy: Any) -> EmpiricalRisk:
        """The current examples on the model as it is."""
        if self._current is None:
            raise RuntimeError("Landscapes are measured in training; this experience has not begun.")
        return self._current.frozen_at(strategy.model)

    def _landscape(self, risks: Sequence[EmpiricalRisk]) -> Landscape | None:
        try:
            return landscape(self.curvature, *risks, k=self.k, epsilon=self.epsilon, ways=self.ways)
        except NonFiniteCurvatureError:  # training has diverged, and goes on
            return None

    def _measured(self, strategy: Any) -> dict[str, Landscape]:
        risks = {"current": [self._now(strategy)], "stored": moved(self._stored, strategy.model)}
        found = {which: self._landscape(some) for which, some in risks.items() if some}
        return {which: one for which, one in found.items() if one is not None}

    def _published(self, strategy: Any, group: str, found: dict[str, Landscape]) -> list[MetricValue]:
        """Undefined values, such as the alignment of no step, are left out."""
        values = {f"{which}/{name}": value for which, one in found.items() for name, value in one.numbers().items()}
        values |= self._motion(strategy, found.get("stored" if self._stored else "current"))
        return self.publish(strategy, {f"{group}/{n}": value for n, value in values.items() if math.isfinite(value)})

    def _motion(self, strategy: Any, now: Landscape | None) -> dict[str, float]:
        """How the step, the drift from the anchor and the curvature at it lie to the reference."""
        then = self._reference
        if then is None:
            return {}
        parameters, anchor = then.space.vector(strategy.model), self._anchored[0].anchor
        values: dict[str, float] = {}
        for name, start in (("step", self._before), ("drift", anchor)):
            if start is not None:
                found = alignment(parameters.to(anchor) - start.to(anchor), then.top[1])
                values |= {f"{name}/alignment": found.inside, f"{name}/leakage": found.leakage}
        if now is not None:
            change = curvature_drift(then, now)
            values |= {"drift/trace_ratio": change.trace_ratio, "drift/overlap": change.overlap}
        return values

    def _drawn(self, strategy: Any, found: dict[str, Landscape]) -> list[MetricValue]:
        """Spectra, for loggers that draw."""
        if not any(isinstance(logger, TensorboardLogger | WandBLogger) for logger in strategy.evaluator.loggers):
            return []
        values: dict[str, Any] = {}
        for which, one in found.items():
            if one.density.magnitude() > 0:
                title = f"{in_short(self.curvature)} of {one.examples} {which} examples"
                values[f"landscape/{which}/spectrum"] = spectrum_figure(one, title)
                values[f"landscape/{which}/log10_eigenvalues"] = logarithms(one.density)
        step = strategy.clock.train_iterations
        return [MetricValue(self, name, value, step) for name, value in values.items()]

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed again when it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_reference"}
