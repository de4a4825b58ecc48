"""The tables of the exactness experiment, and accuracy lost against the error of the model of the past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.exactness.rows import (
    AT_ONCE,
    FREE,
    HEADS,
    JOINT,
    KEPT,
    POLICIES,
)
from benchmarks.harness.plots import COLOURS, MARKERS, new_figure, saved, tidy
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results
    from benchmarks.harness.results import Summary

FLOOR = 1e-4  # of errors in the figure
RIGHT = 0.01  # an error below which a model is called right
WRONG = 0.5  # and one above which it is called wrong
MORE = "lost", "error", "ρ", "apart", "n"
TEXT = """{tasks} tasks of new classes on {stream}: {examples} training images of each class, the features projected to
{directions} random orthogonal directions, and a head with all outputs from the start, unless it grows. After each task
the model of its loss is taken in, and λ times the sum is added to the loss of the next one: at λ = 1 and with a model
that is right, that is the loss of all tasks. To both ½ · {weight:g} · ‖θ‖² is added. Linear heads are trained to the
minimum (conjugate gradients for squared error, at most {iterations} iterations of L-BFGS for softmax), those with
hidden layers by Adam, {steps} steps a task with batches of {batch}. Methods see no task label.

- *accumulate*: each past loss around its own anchor, taken for a minimum (Kirkpatrick et al. 2017); *accumulate,
  slopes*: with its slope there (`Accumulate(gradient=True)`); *merge*: one anchor, the newest (Huszár 2018). *refresh*
  and *adaptive* store a tenth of the examples and estimate anew, with slopes, after each task or also during it;
  nothing can be estimated anew without examples.
- *error* = Σ_t |κ_t| / Σ_t (|actual_t| + |predicted_t|) of the change of past loss over each task t, with κ = actual −
  predicted: from 0, right, to 1. ρ = Σ actual / Σ predicted.
- *lost*: the accuracy of joint training of the same head on all test images, less that of the row. *apart*: the root
  of the mean square distance of the outputs, of softmax the probabilities, from those of joint training; for squared
  error on a linear head, from those of its closed form."""


def report(results: Results, out: Path) -> str:
    """Markdown: what is exact, what can be had without stored examples, all structures and policies, and the figure."""
    lines = ["# When a quadratic model of past loss is enough"]
    if results.manifest.get("options", {}).get("tuning"):
        return "\n\n".join([*lines, "The strengths that are tried, on images held out of training.", _tried(results)])
    main, *others = (part for _, part in results.by("stream"))
    points = list(_points(results))
    _figure(points, out)
    lines += [TEXT.format_map(_setting(main)), "## Where the model is exact"]
    lines += [_exact(part) for part in others if part.first["squared"]]
    lines += ["## Class-incremental, without stored examples and with", _compared(main)]
    lines += ["## Structures and policies at λ = 1"]
    for stream, part in results.by("stream"):
        for head, rows in part.where(method=KEPT, tuned=False).by("kind"):
            if part.first["tasks"] == main.first["tasks"] and part.first["directions"] <= main.first["directions"]:
                lines += [f"### {stream}: {head}", _grid(rows)]
    lines += ["## Accuracy lost against the error of the model", _sentence(points), "![error](exactness.png)"]
    return "\n\n".join(line for line in lines if line)


def _tried(results: Results) -> str:
    rows: list[list[Cell]] = [[one.label, one.final("accuracy")] for one in results.each()]
    return table([Column("tried"), Column("accuracy", 3)], rows)


def _exact(results: Results) -> str:
    """A linear head with squared error on one setting."""
    part = results.where(squared=True)
    rows: list[list[Cell]] = [
        [_name(one.first), one.final("accuracy"), _small(one.final("lost")), _small(one.final("apart")),
         _small(one.final("apart_most")), _small(one.final("error")), _count(one)]
        for one in part.each()
    ]  # fmt: skip
    text = "### {stream}\n\n{tasks} tasks, {examples} images of each class, {directions} directions."
    head = text.format_map(_setting(part))
    titles = ("lost", "apart", "most apart", "error", "n")
    return f"{head}\n\n{table([Column('kept'), Column('accuracy', 4, max), *map(Column, titles)], rows)}"


def _compared(results: Results) -> str:
    """The peers, and of each head the best row of each kind."""
    rows: list[list[Cell]] = []
    for one in results.each():
        if one.first["method"] in AT_ONCE:
            rows.append([_name(one.first), "–", one.final("accuracy"), "", "", "", _count(one)])
    for head in HEADS:
        of_head = results.where(kind=head.kind)
        joint = of_head.where(method=JOINT)
        whole = next((one.final("accuracy") for one in joint.each()), None)
        for one in [*of_head.each()]:
            row = one.first
            free = row["kept_by"] in FREE or row["method"] != KEPT
            if row["method"] in AT_ONCE or not free:
                continue
            accuracy = one.final("accuracy")
            part = f"{accuracy.mean / whole.mean:.3f}" if accuracy and whole else ""
            rows.append([
                _name(row), head.kind, accuracy, part, _strength(row), _mebibytes(one), _count(one)
            ])  # fmt: skip
    more = ("of joint", "λ", "MiB", "n")
    columns = [Column("method"), Column("head"), Column("accuracy", 3, max), *map(Column, more)]
    return table(columns, rows)


def _grid(results: Results) -> str:
    rows: list[list[Cell]] = [
        [f"{one.first['kept']}, {one.first['kept_by']}", one.final("accuracy"), _decimals(one.final("lost")),
         _small(one.final("error")), _small(one.final("rho")), _small(one.final("apart")), _count(one)]
        for one in results.each()
    ]  # fmt: skip
    return table([Column("kept"), Column("accuracy", 3, max), *map(Column, MORE)], rows)


@dataclass(frozen=True)
class Point:
    """A row at λ = 1."""

    head: str
    policy: str
    error: float
    lost: float


def _points(results: Results) -> Iterator[Point]:
    for one in results.where(method=KEPT, tuned=False).each():
        error, lost = one.final("error"), one.final("lost")
        if error and lost and isfinite(error.mean) and isfinite(lost.mean):
            yield Point(one.first["kind"], one.first["kept_by"], error.mean, lost.mean)


def _sentence(points: Sequence[Point]) -> str:
    """What the figure shows, as numbers that can be read off it."""
    from scipy.stats import spearmanr

    right = [p.lost for p in points if p.error < RIGHT]
    between = [p.lost for p in points if RIGHT <= p.error < WRONG]
    wrong = [p.lost for p in points if p.error >= WRONG]
    order = spearmanr([p.error for p in points], [p.lost for p in points]).statistic if len(points) > 2 else 0.0
    parts = [f"Of {len(points)} rows at λ = 1"]
    most = max(right, default=0.0)
    parts += [f"the {len(right)} whose error is below {RIGHT:g} lose at most {most:.4f} of accuracy"] if right else []
    parts += [f"the {len(between)} between {RIGHT:g} and {WRONG:g} lose {_range(between)}"] if between else []
    parts += [f"the {len(wrong)} above {WRONG:g} lose {_range(wrong)}"] if wrong else []
    return f"{', '.join(parts)}; the rank correlation of error and loss (Spearman) is {order:.2f}."


def _range(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.3f} to {ordered[-1]:.3f}, {ordered[len(ordered) // 2]:.3f} in the median"


def _figure(points: Sequence[Point], out: Path) -> None:
    from matplotlib.lines import Line2D

    figure = new_figure(8.6, 5.4)
    axes = figure.subplots()
    colours = dict(zip((head.kind for head in HEADS), COLOURS))
    markers = dict(zip(POLICIES, MARKERS))
    for point in points:
        axes.plot(
            max(point.error, FLOOR), point.lost, color=colours[point.head], marker=markers[point.policy], linestyle="",
            markersize=6.5, markeredgecolor="white", markeredgewidth=0.6, alpha=0.9,
        )  # fmt: skip
    below = f"error of the model of past loss (what is less than {FLOOR:g} is drawn there)"
    tidy(axes, "What a wrong model of the past costs", below, "accuracy lost against joint training", log_x=True)
    looks = [(head, colour, "o") for head, colour in colours.items()]
    looks += [(policy, "#333333", marker) for policy, marker in markers.items()]
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, c, m in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    saved(figure, out / "exactness.png")


def _setting(results: Results) -> dict:
    """The setting of the first label: its names also where other columns have them too."""
    return results.config(next(iter(results.columns)))["setting"] | results.first


def _name(row: dict) -> str:
    if row["method"] != KEPT:
        return row["method"]
    return f"{row['kept']}, {row['kept_by']}{', tuned' if row['tuned'] else ''}"


def _strength(row: dict) -> str:
    return "" if row["strength"] is None else f"{row['strength']:g}"


def _mebibytes(one: Results) -> str:
    size = one.final("bytes")
    return f"{size.mean / 2**20:.3f}" if size and size.mean else ""


def _small(summary: Summary | None) -> str:
    return "–" if summary is None else f"{summary.mean:.2g}"


def _decimals(summary: Summary | None) -> str:
    return "–" if summary is None else f"{summary.mean:.3f}"


def _count(one: Results) -> int:
    accuracy = one.final("accuracy")
    return accuracy.n if accuracy else 0
