"""The table and the figure of the estimators of the Fisher."""

from __future__ import annotations

from itertools import pairwise
from math import inf, log10
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.fisher_estimators.experiment import COMMON, EXACT, NAIVE
from benchmarks.harness.labels import Named, label_ends, label_points
from benchmarks.harness.plots import MUTED, new_figure, saved, styles, tidy
from benchmarks.harness.results import Summary
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLE = "# Five methods to compute the Fisher information"
PART = 0.9
EXPLANATION = """\
After van de Ven, "On the computation of the Fisher information in continual learning" (2025). Online EWC: the newest
anchor, and the sum of the diagonals of all tasks (γ = 1). Penalty λ ½ Σ_i F_i δ_i², with F of the *mean* loss of a
task; code that sums over the N ≈ 12,000 examples of a task instead has our λ / N.

- *exact*: the expectation over the model's own labels in closed form, on all examples or on 500 random ones.
- *one sampled label*: a label drawn from the model for each example.
- *empirical*: the observed label of each example.
- *batches of 128*: the squares of the mean gradients of mini-batches, what common code calls EWC.

*best λ* and *accuracy* are those of the best strength tried, chosen on the seeds shown: the table compares where
estimators work, not which is best. *at 1e4* is the accuracy at one λ for all. *works from* is the λ at which the mean
accuracy has closed nine tenths of the gap from Naive to the best of the table, interpolated on the logarithmic axis,
and *λ ratio* its ratio to that of the exact Fisher. *trace* is that of the Fisher of the first task, and *trace ratio*
the exact one's over it: a penalty as stiff needs that many times the strength. *seconds* is the time of the first
estimate. Mean ± standard deviation over n seeds.

*Naive* is not quite the limit of weak strengths: a penalty, however weak, gives the heads of past tasks a gradient, so
that Adam takes a few more steps with what is left of their momentum, which it does not without."""
WHY = """\
Why the ratios are so large: the network is sure of nearly all examples it was trained on. With p the probability of the
wrong label, the exact Fisher of an example is p (1 − p) ‖∇f‖², the gradient at the observed label, which is the right
one, gives p² ‖∇f‖². The sampled label gives the exact Fisher in expectation only: nearly all of that lies in labels
that are too rare to be drawn, so that what is drawn is nearly always the empirical Fisher. Squares of means over
batches of b are smaller by another factor of about b, where the gradients of the examples point in different
directions."""


def report(results: Results, out: Path) -> str:
    """Markdown with one figure, from whatever has finished."""
    found = curves(results)
    _figure(results, found, out)
    figure = "![Accuracy against strength](fisher_estimators.png)"
    return "\n\n".join([TITLE, _setting(results), EXPLANATION, _table(results, found), WHY, figure])


Curve = dict[float, Summary]
"""Average accuracy by strength."""


def curves(results: Results) -> dict[str, Curve]:
    """By estimator: average accuracy by strength, of those that have finished."""
    found: dict[str, Curve] = {}
    for one in results.each():
        accuracy, row = one.final("average_accuracy"), one.first
        if accuracy and row["strength"] is not None:
            found.setdefault(row["name"], {})[row["strength"]] = accuracy
    return found


def naive(results: Results) -> Summary | None:
    """The average accuracy without a penalty, where it has finished."""
    return next((one.final("average_accuracy") for one in results.where(name=NAIVE).each()), None)


def works(curve: Curve, level: float) -> float | None:
    """The strength at which the mean first reaches `level`, interpolated on the logarithmic axis; None where it does so
    at the first strength tried, or never.

    >>> at = {1.0: 0.90, 10.0: 0.94, 100.0: 0.96}
    >>> round(works({strength: Summary(mean, None, 1) for strength, mean in at.items()}, 0.95), 2)  # 10 ** 1.5
    31.62
    """
    points = sorted((log10(strength), summary.mean) for strength, summary in curve.items())
    for (place, below), (following, above) in pairwise(points):
        if below < level <= above:
            return 10 ** (place + (following - place) * (level - below) / (above - below))
    return None


def level_of(results: Results, found: dict[str, Curve]) -> float:
    """Naive's mean, and nine tenths of the gap to the best of all estimators above it; infinite without Naive."""
    least = naive(results)
    best = max((summary.mean for curve in found.values() for summary in curve.values()), default=inf)
    return least.mean + PART * (best - least.mean) if least else inf


def _setting(results: Results) -> str:
    least = naive(results)
    without = f" Without a penalty: {_written(least)}." if least else ""
    return (
        "{tasks} tasks on {images}, two digits each, with task labels; a ReLU network with two hidden layers of "
        "{hidden} and a head for each task, Adam at {rate:g}, batches of {batch}, {steps:,} steps a task."
    ).format_map(results.first) + without


def _table(results: Results, found: dict[str, Curve]) -> str:
    columns = [
        Column("estimator"), Column("best λ"), Column("accuracy", 4), Column(f"at {_power(COMMON)}", 4),
        Column("works from"), Column("λ ratio"), Column("trace"), Column("trace ratio"),
        Column("seconds", 2, min), Column("n"),
    ]
    level, trace = level_of(results, found), _first(results, "trace", EXACT)
    least = works(found.get(EXACT, {}), level)
    rows: list[list[Cell]] = []
    for name, curve in found.items():
        own, low = _first(results, "trace", name), works(curve, level)
        best = max(curve, key=lambda strength: curve[strength].mean)
        rows.append([
            name, _power(best), curve[best], curve.get(COMMON),
            _power(low), _power(low / least if low and least else None),
            _power(own), _power(trace / own if trace and own else None),
            _first(results, "estimate_seconds", name), curve[best].n,
        ])
    return table(columns, rows)


def _first(results: Results, metric: str, name: str) -> float | None:
    """The mean over seeds of what is measured after the first task, where no strength has acted yet."""
    found = (one.final(metric) for one in results.where(name=name).each())
    known = next((summary for summary in found if summary), None)
    return known.mean if known else None


def _power(value: float | None) -> str | None:
    """With two digits, as a power of ten where it is far from 1."""
    if value is None:
        return None
    if 0.1 <= value < 100:
        return f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _written(summary: Summary) -> str:
    spread = "" if summary.std is None else f" ± {summary.std:.4f}"
    return f"{summary.mean:.4f}{spread}"


def _along(curve: Curve) -> list[tuple[float, float]]:
    """Places on the line through the points, close enough that no label is put on it."""
    points = [(strength, summary.mean) for strength, summary in sorted(curve.items())]
    between = [
        (start[0] ** (1 - part) * end[0] ** part, start[1] * (1 - part) + end[1] * part)
        for start, end in pairwise(points) for part in (0.2, 0.4, 0.6, 0.8)
    ]  # fmt: skip
    return points + between


def _figure(results: Results, found: dict[str, Curve], out: Path) -> None:
    figure = new_figure(8.6, 4.0)
    axes, least, ends = figure.subplots(), naive(results), []
    for name, style in styles(list(found)).items():
        points = sorted(found[name].items())
        strengths, means = [strength for strength, _ in points], [summary.mean for _, summary in points]
        spreads = [summary.std or 0.0 for _, summary in points]
        axes.plot(strengths, means, linewidth=1.7, **style.line)
        ends.append(Named(name, strengths[-1], means[-1], style.colour))
        low, high = ([mean + sign * s for mean, s in zip(means, spreads)] for sign in (-1, 1))
        axes.fill_between(strengths, low, high, color=style.colour, alpha=0.15, linewidth=0)
    if least:
        axes.axhline(least.mean, color=MUTED, linestyle="--", linewidth=1.2)
    axes.margins(x=0.15, y=0.12)  # room for labels
    axes.set_xscale("log")
    axes.set_xlabel("strength λ")
    axes.set_ylabel("average accuracy")
    tidy(axes, "Each estimator works at strengths of its own")
    label_points(figure, {axes: ends}, {axes: [point for curve in found.values() for point in _along(curve)]})
    if least:
        label_ends(figure, {axes: [Named(NAIVE, axes.get_xlim()[1], least.mean, MUTED)]})
    saved(figure, out / "fisher_estimators.png")
