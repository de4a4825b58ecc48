"""The shape of the loss along training, of the current task and of stored examples of past ones, on any strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.logging import TensorboardLogger, WandBLogger
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.landscape.landscape import (
    METHODS,
    Landscape,
    alignment,
    check_options,
    curvature_drift,
    landscape,
    moved,
)
from avalanche_curv.core.landscape.spectrum import Density, SpectrumMethod
from avalanche_curv.core.options import Fixed, Setting, check_count, check_fraction, check_seed, in_short
from avalanche_curv.core.quadratic.policies import part_of
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.metrics.gradients import GradientMetric
from avalanche_curv.plugins import _bridge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 6  # eigenvalues that much smaller than the largest are not drawn: in float32 they are rounding
BINS = 64
VALUES = 3000  # of a histogram, at most


@known_arguments
def landscape_metrics(
    *,
    curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
    fraction: float = 0.1,
    seed: int = 0,
    every: int = 100,
    k: int = 10,
    epsilon: float = 1e-2,
    methods: Sequence[SpectrumMethod] = METHODS,
) -> list[ScalarMetric]:
    """Metrics of the curvature of the loss along training, of how steps and drift lie to it, and of both gradients.

    Measured every n iterations, counted from the first of the experience, with {sharpness, trace, numerical_rank,
    effective_rank, energy, exact} as in `core.Landscape`:

    - `landscape/current/...`: a random `fraction` of the current experience, the model as it is;
    - `landscape/stored/...`: such a fraction of each past experience, on the past function as frozen at the newest end,
      at the current parameters;
    - `landscape/step/{alignment,leakage}` of the optimizer's step, and `landscape/drift/{alignment,leakage}` of θ − a,
      with the top k eigenvectors of the stored examples at the newest anchor a (`core.Alignment`);
    - `landscape/drift/{trace_ratio,overlap}`: the curvature of the stored examples now against that at the anchor;
    - `gradient/{task_norm,penalty_norm,cosine}` (see `GradientMetric`).

    While there is no past, the current experience at its start takes its place. At the end of each experience, before
    it becomes part of the past, come `landscape_experience/{current,stored,drift}/...` and, where a logger draws,
    `landscape/{current,stored}/spectrum`, a figure, and `.../log10_eigenvalues`, a histogram.

    `fraction` and `seed` choose the same examples as those of `fidelity_metrics`. `methods` says how spectra are
    computed (see `core.landscape`), `exact` is 1 where that is exact. Undefined values are left out, and all of them
    where the curvature is not finite. Measuring draws no random numbers and leaves training bit-identical. Raises
    TypeError or ValueError for unusable options.

    >>> from avalanche_curv import GGN
    >>> [type(metric).__name__ for metric in landscape_metrics(curvature=GGN(), every=50)]
    ['LandscapeMetric', 'GradientMetric']
    """
    return [LandscapeMetric(every, curvature, fraction, seed, k, epsilon, methods), GradientMetric(every)]


class LandscapeMetric(ScalarMetric):
    """The values `landscape...` of `landscape_metrics`, which says what the arguments mean."""

    fraction, seed = Setting(check_fraction), Setting(check_seed)
    curvature, methods = Fixed[Curvature](), Fixed[tuple[SpectrumMethod, ...]]()
    k, epsilon = Fixed[int](check_count), Fixed[float]()

    def __init__(
        self,
        every: int,
        curvature: Curvature,
        fraction: float,
        seed: int,
        k: int,
        epsilon: float,
        methods: Sequence[SpectrumMethod],
    ) -> None:
        super().__init__(every)
        check_options(curvature, k, epsilon, methods)
        self.curvature, self.fraction, self.seed = curvature, fraction, seed
        self.k, self.epsilon, self.methods = k, epsilon, tuple(methods)
        self._task_ends = _bridge.TaskEnds()
        self._current: EmpiricalRisk | None = None  # as frozen at the start of the task
        self._stored: tuple[EmpiricalRisk, ...] = ()  # all as frozen at the end of the newest task
        self._before: Tensor | None = None  # the parameters before a step that is measured

    def before_training_exp(self, strategy: Any) -> None:
        if self._current is None:
            _bridge.preflight(strategy, self._try)
            risk = _bridge.current_risk(strategy, batch_size=256)
            self._current = part_of(risk, self.fraction, self.seed, len(self._stored))

    def _try(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep an experience from being measured, as seen on a few of its examples."""
        self.curvature.check_loss(risk.loss)
        if not self._stored:
            self._landscape((risk,))

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
        """The landscape of those examples at the anchor."""
        return self._landscape(self._anchored)

    def _now(self, strategy: Any) -> EmpiricalRisk:
        """The current examples on the model as it is."""
        if self._current is None:
            raise RuntimeError("Landscapes are measured in training; this experience has not begun.")
        return self._current.frozen_at(strategy.model)

    def _landscape(self, risks: Sequence[EmpiricalRisk]) -> Landscape | None:
        try:
            return landscape(self.curvature, *risks, k=self.k, epsilon=self.epsilon, methods=self.methods)
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
        """Without the landscape at the anchor, which is computed again when it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_reference"}


def spectrum_figure(landscape: Landscape, of: str) -> Figure:
    """A histogram of the eigenvalues, both axes logarithmic; negative ones by their magnitude, in a colour of their
    own. The title says what it is the spectrum `of`, the lines below how each quantity was computed.

    Made without pyplot, which would keep it and change global state.
    """
    from matplotlib.figure import Figure

    density = landscape.density
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    top = float(density.nodes.abs().max())
    edges = torch.logspace(math.log10(top) - DECADES, math.log10(top * 1.001), BINS + 1, dtype=torch.float64)
    for sign, label, colour in ((1, "positive", "#0072B2"), (-1, "negative", "#D55E00")):
        nodes = sign * density.nodes
        if (nodes > edges[0]).any():
            axes.hist(nodes.numpy(), bins=edges.tolist(), weights=density.counts.numpy(), label=label, color=colour)
    drawn = float(density.counts[density.nodes.abs() > edges[0]].sum())
    axes.set(xscale="log", yscale="log", xlabel="|λ|", ylabel="eigenvalues per bin")
    axes.set_title(f"Spectrum of {of}", fontsize="medium")
    figure.supxlabel(methods_used(landscape), fontsize="small")
    axes.legend(title=f"{density.size - drawn:,.0f} of {density.size:,.0f} near 0, not drawn", fontsize="small")
    return figure


def methods_used(landscape: Landscape) -> str:
    """How each quantity was computed, one line for each method."""
    lines: dict[str, list[str]] = {}
    for quantity, method in landscape.methods.items():
        lines.setdefault(method, []).append(quantity.replace("_", " "))
    if len(lines) == 1:
        return f"all by {next(iter(lines))}"
    return "\n".join(f"{', '.join(quantities)}: {method}" for method, quantities in lines.items())


def logarithms(density: Density) -> Float[Tensor, "n"]:
    """log10 |λ| of the eigenvalues that are not zero up to rounding, for a histogram: each once where it is known, at
    evenly spaced quantiles of a quadrature.

    >>> logarithms(Density(torch.tensor([0.0, 1.0, 100.0]), torch.tensor([2.0, 1.0, 1.0]))).tolist()
    [0.0, 2.0]
    """
    magnitude = density.nodes.abs()
    kept = magnitude > 10.0**-DECADES * magnitude.max()
    order = magnitude[kept].argsort()
    values, counts = magnitude[kept][order].log10(), density.counts[kept][order]
    if bool((counts == 1).all()):
        return values
    reached = counts.cumsum(0)
    number = max(1, min(VALUES, round(float(reached[-1]))))
    places = (torch.arange(number, dtype=reached.dtype) + 0.5) * reached[-1] / number
    return values[torch.searchsorted(reached, places).clamp_max(len(values) - 1)]
