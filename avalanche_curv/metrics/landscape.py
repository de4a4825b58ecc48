"""The shape of the loss along training, of the current task and of stored examples of past ones, on any strategy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from avalanche.evaluation.metric_results import MetricValue
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.arguments import outside
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
from avalanche_curv.core.options import Fixed, Setting, check_count, check_fraction, check_seed, in_short, optional
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.metrics._published import ScalarMetric, draws, finite
from avalanche_curv.metrics.gradients import GradientMetric
from avalanche_curv.plugins import _bridge, _tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IN_TEXT = ("landscape/current/sharpness", "landscape/stored/sharpness", "landscape/step/alignment")
DECADES = 6  # eigenvalues that much smaller than the largest are not drawn: in float32 they are rounding
BINS = 64
VALUES = 3000  # of a histogram, at most
FEWEST = 100  # examples, which are measured however many rows each has


@known_arguments
def landscape_metrics(
    *,
    curvature: Curvature = Fisher(),  # noqa: B008  a frozen value
    fraction: float = 0.1,
    seed: int = 0,
    every: int = 1000,
    k: int = 10,
    epsilon: float = 1e-2,
    methods: Sequence[SpectrumMethod] = METHODS,
    max_rows: int | None = 2000,
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

    The cost grows with the rows of the curvature: an example has one of an empirical Fisher, and one less than there
    are classes of a Fisher or GGN of cross-entropy. Where the current examples, or all stored ones together, have more
    than `max_rows` (None: no limit), each measurement is of a random part of them, drawn by `seed` and the same one
    until the task ends: of as large a part of each past experience, and of 100 examples at least. A warning says so
    once. Numerical and effective rank are those of that part, and grow with it. For a kind without rows, such as the
    Hessian, the examples count.

    A measurement takes two landscapes, of the current and of the stored examples. One of M rows takes a forward and a
    backward pass for each column of S (see `OutputCurvature`) and the eigenvalues of an M × M matrix, some M³
    operations: 120 gradient passes over a batch of 128 for 1,800 rows of an MLP 784-400-400-10, 10 for 200. Beyond
    `GramMatrix(rows=3000)`, and for the Hessian, it takes some 250 products, of two to four gradient passes over the
    examples each. So `every` wants thousands with the Fisher, hundreds with
    the empirical one; each experience is measured at its first iteration and its end in any case.

    Text loggers print `landscape/{current,stored}/sharpness`, `landscape/step/alignment` and `gradient/...`; other
    loggers get all.

    >>> from avalanche_curv import GGN
    >>> [type(metric).__name__ for metric in landscape_metrics(curvature=GGN(), every=50)]
    ['LandscapeMetric', 'GradientMetric']
    """
    return [LandscapeMetric(every, curvature, fraction, seed, k, epsilon, methods, max_rows), GradientMetric(every)]


class LandscapeMetric(ScalarMetric):
    """The values `landscape...` of `landscape_metrics`, which says what the arguments mean."""

    fraction, seed = Setting(check_fraction), Setting(check_seed)
    curvature, methods = Fixed[Curvature](), Fixed[tuple[SpectrumMethod, ...]]()
    k, epsilon = Fixed[int](check_count), Fixed[float]()
    max_rows = Setting[int | None](optional(partial(check_count, hint="None is no limit.")))

    def __init__(
        self,
        every: int,
        curvature: Curvature,
        fraction: float,
        seed: int,
        k: int,
        epsilon: float,
        methods: Sequence[SpectrumMethod],
        max_rows: int | None,
    ) -> None:
        super().__init__(every, IN_TEXT)
        check_options(curvature, k, epsilon, methods)
        self.curvature, self.fraction, self.seed = curvature, fraction, seed
        self.k, self.epsilon, self.methods, self.max_rows = k, epsilon, tuple(methods), max_rows
        self._task_ends = _tasks.TaskEnds()
        self._current: EmpiricalRisk | None = None  # as frozen at the start of the task
        self._stored: tuple[EmpiricalRisk, ...] = ()  # all as frozen at the end of the newest task
        self._parts: dict[str, tuple[EmpiricalRisk, ...]] = {}  # "current" and "stored": what is measured
        self._limited = False  # once `max_rows` has taken effect
        self._before: Tensor | None = None  # the parameters before a step that is measured

    def before_training_exp(self, strategy: Any) -> None:
        if self._current is None:
            _bridge.preflight(strategy, self._try)
            self._current = _bridge.current_part(strategy, self.fraction, self.seed, len(self._stored))
            self._parts = {"current": self._part([self._current]), "stored": self._part(self._stored)}

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
        if self._current is None:
            raise RuntimeError("Landscapes are measured in training; this experience has not begun.")
        found = self._measured(strategy)
        published = self._published(strategy, "landscape_experience", found) + self._drawn(strategy, found)
        newest = self._current.frozen_at(strategy.model)
        self._stored = (*(risk.at(newest) for risk in self._stored), newest)
        self._current = None
        self.__dict__.pop("_reference", None)
        return published

    @property
    def _anchored(self) -> tuple[EmpiricalRisk, ...]:
        """The examples, frozen at the anchor, that steps and drift are measured against."""
        return self._parts["stored"] or self._parts["current"]

    @cached_property
    def _reference(self) -> Landscape | None:
        """The landscape of those examples at the anchor."""
        return self._landscape(self._anchored)

    def _part(self, risks: Sequence[EmpiricalRisk]) -> tuple[EmpiricalRisk, ...]:
        """The random part of each of these examples that is measured, of at most `max_rows` rows together."""
        part = part_within(self.curvature, risks, self.max_rows, self.seed)
        counts = [sum(risk.examples for risk in some) for some in (part, risks)]
        if counts[0] < counts[1] and not self._limited:
            self._limited = True
            warnings.warn(
                f"landscape_metrics measures a random {counts[0]:,} of {counts[1]:,} examples, since all of them have "
                f"{rows_of(self.curvature, risks):,} rows, more than max_rows={self.max_rows}. Ranks are those of so "
                "many. Give max_rows=None to measure all, at a cost that grows with them, or give a smaller fraction.",
                UserWarning,
                stacklevel=outside(),
            )
        return part

    def _landscape(self, risks: Sequence[EmpiricalRisk]) -> Landscape | None:
        try:
            return landscape(self.curvature, *risks, k=self.k, epsilon=self.epsilon, methods=self.methods)
        except NonFiniteCurvatureError:  # training has diverged, and goes on
            return None

    def _measured(self, strategy: Any) -> dict[str, Landscape]:
        now = [risk.frozen_at(strategy.model) for risk in self._parts["current"]]
        risks = {"current": now, "stored": moved(self._parts["stored"], strategy.model)}
        found = {which: self._landscape(some) for which, some in risks.items() if some}
        return {which: one for which, one in found.items() if one is not None}

    def _published(self, strategy: Any, group: str, found: dict[str, Landscape]) -> list[MetricValue]:
        """Undefined values, such as the alignment of no step, are left out."""
        values = {f"{which}/{name}": value for which, one in found.items() for name, value in one.numbers().items()}
        values |= self._motion(strategy, found.get("stored" if self._stored else "current"))
        return self.publish(strategy, finite(group, values))

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
        if not draws(strategy):
            return []
        values: dict[str, Any] = {}
        for which, one in found.items():
            if one.density.magnitude() > 0:
                title = f"{in_short(self.curvature)} of {one.examples} {which} examples"
                values[f"landscape/{which}/spectrum"] = spectrum_figure(one, title)
                values[f"landscape/{which}/log10_eigenvalues"] = logarithms(one.density)
        return self.publish_drawn(strategy, values)

    def __getstate__(self) -> dict[str, Any]:
        """Without the landscape at the anchor, which is computed again when it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_reference"}


def rows_of(curvature: Curvature, risks: Sequence[EmpiricalRisk]) -> int:
    """The number of rows of the curvature of all these examples; of examples, for a kind without rows."""
    counts = ((curvature.row_count(risk), risk.examples) for risk in risks)
    return sum(examples if rows is None else rows for rows, examples in counts)


def part_within(
    curvature: Curvature, risks: Sequence[EmpiricalRisk], most: int | None, seed: int
) -> tuple[EmpiricalRisk, ...]:
    """As large a random part of each risk as has at most `most` rows for all together, but at least 100 examples of all
    and one of each; all examples where they have no more rows, and for None. The part is drawn by `seed`, independently
    of the part that is stored."""
    examples, rows = sum(risk.examples for risk in risks), rows_of(curvature, risks) if most is not None else 0
    share = 1.0 if most is None or rows <= most else max(most / rows, FEWEST / examples)
    if share >= 1:
        return tuple(risks)
    counts = [max(1, int(share * risk.examples)) for risk in risks]
    return tuple(
        risk.subset(count / risk.examples, part_seed(seed + 1, number))
        for number, (risk, count) in enumerate(zip(risks, counts))
    )


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
