"""How wrong quadratic models of the past are along training, on any strategy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from avalanche.evaluation.metric_results import MetricValue

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.fidelity.monitor import PastModels
from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.options import Fixed, Forwarded, Setting, check_fraction, check_kind, check_seed
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.selection import ParameterSelector, Selection, selection_of
from avalanche_curv.metrics._published import ScalarMetric, draws
from avalanche_curv.metrics.accuracy import TaskAccuracyMetric
from avalanche_curv.metrics.penalty import PenaltyMetric
from avalanche_curv.plugins import CurvatureEWCPlugin, _bridge, _tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IN_TEXT = ("fidelity/accumulate/kappa_abs", "fidelity/accumulate/rho_pooled", "fidelity/refresh/kappa_abs",
           "fidelity/refresh/rho_pooled", "growth/accumulate", "growth/refresh")  # fmt: skip
# how the quadratic models are drawn
COLOURS = {"accumulate": "#0072B2", "refresh": "#D55E00"}
WIDTHS = {"accumulate": 4.0, "refresh": 1.3}  # where both are the same, as with one past experience, both are seen
NAMES = {"accumulate": "own anchors", "refresh": "newest anchor"}


@known_arguments
def fidelity_metrics(
    *,
    of: CurvatureEWCPlugin | None = None,
    curvature: Curvature | None = None,
    fraction: float | None = None,
    seed: int | None = None,
    every: int = 100,
    stream: Sequence[Any] | None = None,
    include: Iterable[ParameterSelector] = (),
    exclude: Iterable[ParameterSelector] = (),
) -> list[ScalarMetric]:
    """Metrics of the fidelity of quadratic models of past loss, of accuracy on old and new examples, and of the
    penalty.

    A random `fraction` (0.1) of each experience's examples, drawn by `seed` (0), is stored. Two quadratic models of
    their loss are measured side by side, whatever the strategy trains with: `accumulate`, each experience at its own
    anchor, and `refresh`, all at the end of the newest experience. For each, without and with the linear term
    (`_linear`), the means of kappa, |kappa|, gamma, alpha and rho (`core.fidelity.Fidelity`) are published, overall and
    by past experience, beside the `distance` ‖θ − anchor‖ of both forms (`PastModels.distances`):

    - `fidelity/<model>/<measure>[/experience_t]` every n iterations,
    - `fidelity_experience/...` at the end of each experience, before it becomes part of the past,
    - `fidelity_trajectory/...` then too: the average over all measured iterations so far,
    - `fidelity/kappa_against_distance` then too, where a logger draws: a figure of this experience's iterations.

    Besides come `accuracy/{stored,current_task,past_tasks}`, on `stream` if one is given (for instance
    `benchmark.test_stream`) and else on training examples, and `penalty/{raw,weighted}` of a CurvatureEWC.

    `include` and `exclude` select parameters as in `CurvatureEWCPlugin`; what was frozen at an anchor and trains later
    is measured from then on. `of` takes the curvature and the selection from a CurvatureEWCPlugin, and fraction and
    seed from a policy of it that stores only part of the examples, where they are not given. Each experience is
    measured on the past function as frozen at its end (`accumulate`), or on that of the newest end (`refresh`), masks
    and padding of growing heads included. What growth alone changes is `growth/<model>[/experience_t]`, before the
    first step: the loss of the model as it has grown less that of the frozen function, at the same parameters.
    Measuring draws no random numbers and leaves training bit-identical. Raises TypeError for a curvature without
    per-example form and ValueError for a fraction or `every` out of range.

    A measurement takes, for each past experience at its own anchor and once more for all at the newest, a forward and a
    backward pass over its stored examples and a product of each one's Jacobian with θ − anchor: of a multilayer
    perceptron, with ten past experiences, 1.6 and 1.4 gradient passes over all stored examples, and more of other
    models. Accuracies take a forward pass over up to 1,000 examples of each task. With a tenth of t past tasks stored
    and n iterations an epoch, one measurement thus takes as long as some 0.3 t n steps of training: 100 for three tasks
    of 100 batches, so that `every=1000` makes it a tenth; a smaller `fraction` makes it cheaper in proportion.

    Text loggers print `fidelity/{accumulate,refresh}/{kappa_abs,rho_pooled}`, `growth/{accumulate,refresh}`,
    `accuracy/...` and `penalty/weighted` alone (`ScalarMetric.in_text`); TensorBoard, JSONL and other loggers get all.

    >>> from avalanche_curv import GGN
    >>> [type(metric).__name__ for metric in fidelity_metrics(curvature=GGN(), every=5)]
    ['FidelityMetric', 'TaskAccuracyMetric', 'PenaltyMetric']
    """
    selection = selection_of(include, exclude)
    if of is not None:
        check_kind("of", of, CurvatureEWCPlugin, "the CurvatureEWCPlugin, or strategy.ewc of a CurvatureEWC")
        curvature = of.curvature.unmended() if curvature is None else curvature  # mended is a spectrum as a whole
        stored = getattr(of.policy, "fraction", 1.0)
        fraction = stored if fraction is None and stored < 1 else fraction
        seed = getattr(of.policy, "seed", None) if seed is None else seed
        selection = of.selection if selection == Selection() else selection
    fraction, seed = 0.1 if fraction is None else fraction, 0 if seed is None else seed
    fidelity = FidelityMetric(every, Fisher() if curvature is None else curvature, fraction, seed, selection)
    return [fidelity, TaskAccuracyMetric(every, stream, fraction, seed), PenaltyMetric(every)]


class FidelityMetric(ScalarMetric):
    """The values `fidelity...` and `growth/...` of `fidelity_metrics`, which says what the arguments mean."""

    fraction, seed = Setting(check_fraction), Setting(check_seed)
    past = Setting[PastModels](partial(check_kind, kind=PastModels, example="PastModels(Fisher())"))
    curvature = Forwarded("past")
    selection = Fixed[Selection]()
    trajectory = Fixed[defaultdict[str, "_Mean"]]()

    def __init__(
        self,
        every: int,
        curvature: Curvature,
        fraction: float,
        seed: int,
        selection: Selection = Selection(),  # noqa: B008  a frozen value
    ) -> None:
        super().__init__(every, IN_TEXT)
        self.fraction, self.seed, self.selection = fraction, seed, selection
        self.past = PastModels(curvature)
        self._task_ends = _tasks.TaskEnds()
        self.trajectory = defaultdict(_Mean)
        self._curves = DistanceCurves()
        self._begun = False  # the task, of which an online stream gives one part after another

    def before_training_exp(self, strategy: Any) -> list[MetricValue]:
        if self._begun:
            return []
        _bridge.preflight(strategy, self._try, self.selection)
        self._begun = True
        self.past = self.past.covering(strategy.model)
        return self._published(strategy, "growth", self.past.growth(strategy.model))

    def _try(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep an experience from being measured, as seen on a few of its examples."""
        self.past.curvature.check_loss(risk.loss)
        if not self.past.accumulate:
            PastModels(self.past.curvature).with_experience(risk).measure(risk.base)

    def after_training_iteration(self, strategy: Any) -> list[MetricValue]:
        if not self.past.accumulate or not self.due(strategy):
            return []
        self.past = self.past.covering(strategy.model)
        values = self.past.measure(strategy.model)
        for name, value in values.items():
            self.trajectory[name].add(value)
        self._curves.add(values)
        return self._published(strategy, "fidelity", values)

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        if not self._task_ends.here(strategy):
            return []
        self._begun = False
        published: list[MetricValue] = []
        if self.past.accumulate:
            published += self._published(strategy, "fidelity_experience", self.past.measure(strategy.model))
            means = {name: mean.value for name, mean in self.trajectory.items()}
            published += self._published(strategy, "fidelity_trajectory", means)
            published += self._figure(strategy)
        stored = _bridge.current_part(strategy, self.fraction, self.seed, len(self.past.accumulate), self.selection)
        self.past = self.past.with_experience(stored)
        return published

    def _figure(self, strategy: Any) -> list[MetricValue]:
        """The errors in this experience against distance, for loggers that draw."""
        number, curves = len(self.past.accumulate), self._curves
        self._curves = DistanceCurves()
        if not draws(strategy):
            return []
        figure = curves.figure(f"Error of the quadratic models of the past in experience {number}")
        drawn = {} if figure is None else {"fidelity/kappa_against_distance": figure}
        return self.publish_drawn(strategy, drawn)

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


class DistanceCurves:
    """mean |κ| and mean distance ‖θ − a‖ at each measured iteration of one experience, for each quadratic model without
    and with its linear term."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[float, float]]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the points of one measurement, named as by `PastModels.measure`."""
        for model in COLOURS:
            for form in (model, f"{model}_linear"):
                point = values[f"{model}/distance"], values[f"{form}/kappa_abs"]
                if all(map(math.isfinite, point)):
                    self._points.setdefault(form, []).append(point)

    def figure(self, title: str) -> Figure | None:
        """The figure, with one line for each form over its distance, in the order of training; None where nothing was
        measured.

        Both axes are logarithmic, so that a model that is exact up to second order has slope 3. Points at distance
        zero, where every model is exact, are left out.
        """
        curves = {form: [p for p in points if min(p) > 0] for form, points in self._points.items()}
        curves = {form: points for form, points in curves.items() if points}
        return _drawn(curves, title) if curves else None


def _drawn(curves: Mapping[str, list[tuple[float, float]]], title: str) -> Figure:
    """Made without pyplot, which would keep it and change global state."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for form, points in curves.items():
        model = form.removesuffix("_linear")
        linear = form != model
        label = NAMES[model] + (", with linear term" if linear else "")
        (line,) = axes.plot(*zip(*points), color=COLOURS[model], linewidth=WIDTHS[model], label=label)
        line.set(linestyle="--" if linear else "-", marker="s" if linear else "o", markersize=2 + WIDTHS[model])
    axes.set(xscale="log", yscale="log", title=title, xlabel="mean distance ‖θ − anchor‖", ylabel="mean |κ|")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.grid(color="#e4e4e4", linewidth=0.7, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
