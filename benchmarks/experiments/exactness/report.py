"""The tables of the exactness experiment, and accuracy lost against the error of the model of the past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.exactness.learner import CLASSES
from benchmarks.experiments.exactness.rows import (
    AT_ONCE,
    BLOCK,
    FREE,
    GROWS,
    HEADS,
    JOINT,
    KEPT,
    POLICIES,
    RANDOM_UNITS,
    SHRINKAGE,
)
from benchmarks.harness.plots import COLOURS, MARKERS, MUTED, new_figure, saved, tidy
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results
    from benchmarks.harness.results import Summary

FLOOR = 1e-4  # what is nearer to an error of 0 or 1 is drawn there, and ordered as if it were there
RIGHT = 0.01  # an error below which a model is called right
WRONG = 0.5  # and one above which it is called wrong
TICKS = (FLOOR, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1 - 1e-3, 1 - FLOOR)
ENOUGH = 10  # rows for a rank correlation
DRAWN = 2000  # resamples of rows
MORE = "lost", "error", "ρ", "apart", "n"
TEXT = """{tasks} tasks of new classes on {stream}: {examples} training images of each class, the features
projected to {directions} random orthogonal directions, and a head with all outputs from the start, unless it grows.
After each task the model of its loss is taken in, and λ times the sum is added to the loss of the next one: at λ = 1
and with a model that is right, that is the loss of all tasks. To both ½ · {weight:g} · ‖θ‖² is added. Linear heads are
trained to the minimum (conjugate gradients for squared error, at most {iterations} iterations of L-BFGS for softmax),
those with hidden layers by Adam, {steps} steps a task with batches of {batch}. Methods see no task label.

- *accumulate*: each past loss around its own anchor, taken for a minimum (Kirkpatrick et al. 2017); *accumulate,
  slopes*: with its slope there (`Accumulate(gradient=True)`); *merge*: one anchor, the newest (Huszár 2018). *refresh*
  and *adaptive* store a tenth of the examples and estimate anew, with slopes, after each task or also during it;
  nothing can be estimated anew without examples. *Kronecker* is a list of a pair for each task; *replay, equal bytes*
  stores as many bytes of examples as one pair, its anchor and its slope take.
- *error* = Σ_t |κ_t| / Σ_t (|actual_t| + |predicted_t|) of the change of past loss over each task t, with κ = actual −
  predicted: from 0, right, to 1. ρ = Σ actual / Σ predicted.
- *lost*: the accuracy of joint training of the same head on all test images, less that of the row. *apart*: the root
  of the mean square distance of the outputs, of softmax the probabilities, from those of joint training; for squared
  error on a linear head, from those of its closed form.
- *streaming LDA*: shrinkage {shrinkage:g}, as Hayes & Kanan (2020). *ridge on random features*: {units:,} units
  relu(Wx), then ridge regression; RanPAC (McDonnell et al. 2023) has 10,000 and a network adapted to the first task."""
BLOCK_TEXT = """{tasks} tasks of new classes on images of {side} × {side} pixels, {examples} training images of each
class, which the network up to its last block has seen once; that block (but for its depthwise convolution), the last
convolution and a linear layer are trained with softmax, by Adam at {rate:g}, {steps} steps a task with batches of
{batch}. Kronecker factors are one pair (`PartialTraces()`) at the newest anchor. The training images, as the block is
given them, take {megabytes:.1f} MiB, less than a pair: replay with equal bytes would keep them all."""


def report(results: Results, out: Path) -> str:
    """Markdown: what is exact, what can be had without stored examples, all structures and policies, and the figure."""
    lines = ["# When a quadratic model of past loss is enough"]
    if results.tuning:
        return "\n\n".join([*lines, "The strengths that are tried, on images held out of training.", _tried(results)])
    main, *others = (part for _, part in results.by("stream"))
    points = list(_points(results))
    _figure(points, out)
    lines += [TEXT.format_map(_setting(main) | {"shrinkage": SHRINKAGE, "units": RANDOM_UNITS})]
    lines += ["## Accuracy lost against the error of the model", _sentence(points), "![error](exactness.png)"]
    lines += ["## Where the model is exact", *(_exact(part) for part in others if part.first["squared"])]
    lines += ["## Class-incremental, without stored examples and with", _compared(main)]
    for part in others:
        if part.first["kind"] == BLOCK.kind:
            lines += ["## The last block of the backbone", BLOCK_TEXT.format_map(_of_the_block(part)), _compared(part)]
    lines += ["## Structures and policies at λ = 1"]
    for stream, part in results.by("stream"):
        for head, rows in part.where(method=KEPT, tuned=False).by("kind"):
            if part.first["tasks"] == main.first["tasks"] and part.first["directions"] <= main.first["directions"]:
                lines += [f"### {stream}: {head}", _grid(rows)]
    return "\n\n".join(line for line in lines if line)


def _tried(results: Results) -> str:
    rows: list[list[Cell]] = [[one.label, one.final("accuracy")] for one in results.each()]
    return table([Column("tried"), Column("accuracy", 3)], rows)


def _exact(results: Results) -> str:
    """A linear head with squared error on one setting."""
    part = results.where(squared=True)
    rows: list[list[Cell]] = [
        [_name(one.first), one.final("accuracy"), _small(one.final("lost")), _small(one.final("apart")),
         _small(one.final("apart_most")), _small(one.final("error"), 3), _count(one)]
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
            rows.append([_name(one.first), "–", one.final("accuracy"), "", "", "", "", _count(one)])
    for head in (*HEADS, BLOCK):
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
                _name(row), head.kind, accuracy, part, _strength(row), _small(one.final("error"), 3), _mebibytes(one),
                _count(one),
            ])  # fmt: skip
    more = ("of joint", "λ", "error", "MiB", "n")
    columns = [Column("method"), Column("head"), Column("accuracy", 3, max), *map(Column, more)]
    return table(columns, rows)


def _grid(results: Results) -> str:
    rows: list[list[Cell]] = [
        [f"{one.first['kept']}, {one.first['kept_by']}", one.final("accuracy"), _decimals(one.final("lost")),
         _small(one.final("error"), 3), _small(one.final("rho")), _small(one.final("apart")), _count(one)]
        for one in results.each()
    ]  # fmt: skip
    return table([Column("kept"), Column("accuracy", 3, max), *map(Column, MORE)], rows)


@dataclass(frozen=True)
class Point:
    """A row at λ = 1, its error no nearer to 0 and 1 than `FLOOR`."""

    head: str
    policy: str
    error: float
    lost: float

    @property
    def free(self) -> bool:
        """Whether no example is stored."""
        return self.policy in (*FREE, GROWS)


def _points(results: Results) -> Iterator[Point]:
    for one in results.where(method=KEPT, tuned=False).each():
        error, lost = one.final("error"), one.final("lost")
        if error and lost and isfinite(error.mean) and isfinite(lost.mean):
            shown = min(max(error.mean, FLOOR), 1 - FLOOR)
            yield Point(one.first["kind"], one.first["kept_by"], shown, lost.mean)


def _sentence(points: Sequence[Point]) -> str:
    """What the figure shows, as numbers that can be read off it."""
    right = [p.lost for p in points if p.error < RIGHT]
    between = [p.lost for p in points if RIGHT <= p.error < WRONG]
    wrong = [p.lost for p in points if p.error >= WRONG]
    parts = [f"Of {len(points)} rows at λ = 1"]
    most = max(right, default=0.0)
    parts += [f"the {len(right)} whose error is below {RIGHT:g} lose at most {most:.4f} of accuracy"] if right else []
    parts += [f"the {len(between)} between {RIGHT:g} and {WRONG:g} lose {_range(between)}"] if between else []
    parts += [f"the {len(wrong)} above {WRONG:g} lose {_range(wrong)}"] if wrong else []
    free = [p for p in points if p.free]
    kinds = {
        "of all": points,
        "of those that store no example": free,
        f"of these with an error of {RIGHT:g} and above": [p for p in free if p.error >= RIGHT],
        "of those that store a tenth": [p for p in points if not p.free],
    }
    orders = [f"{_order(some)} {kind} ({len(some)})" for kind, some in kinds.items() if len(some) >= ENOUGH]
    says = f"Spearman's rank correlation of the two, with the middle 95% of {DRAWN:,} resamples of rows, is "
    return f"{', '.join(parts)}." + (f" {says}{', '.join(orders)}." if orders else "")


def _order(points: Sequence[Point]) -> str:
    """Spearman's rank correlation, and its percentile interval (Efron & Tibshirani 1993, chapter 13)."""
    import numpy as np
    from scipy.stats import rankdata

    pairs = np.array([(p.error, p.lost) for p in points]).T
    again = np.random.default_rng(0).integers(len(points), size=(DRAWN, len(points)))
    ranks = rankdata(pairs[:, np.vstack([np.arange(len(points)), again])], axis=-1)
    errors, losses = ranks - ranks.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # of resamples that are one row again and again
        found = (errors * losses).sum(-1) / np.sqrt((errors**2).sum(-1) * (losses**2).sum(-1))
    low, high = np.nanpercentile(found[1:], (2.5, 97.5))
    return f"{found[0]:.2f} [{low:.2f}, {high:.2f}]"


def _range(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.3f} to {ordered[-1]:.3f}, {ordered[len(ordered) // 2]:.3f} in the median"


def _figure(points: Sequence[Point], out: Path) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    figure = new_figure(8.6, 5.4)
    axes = figure.subplots()
    colours = dict(zip((head.kind for head in (*HEADS, BLOCK)), COLOURS))
    markers = dict(zip(POLICIES, MARKERS))
    for point in points:
        axes.plot(
            point.error, point.lost, color=colours[point.head], marker=markers[point.policy], linestyle="",
            markersize=6.5, markeredgecolor="white", markeredgewidth=0.6, alpha=0.9,
        )  # fmt: skip
    below = f"error of the model of past loss (what is nearer than {FLOOR:g} to 0 or 1 is drawn there)"
    tidy(axes, "What a wrong model of the past costs", below, "accuracy lost against joint training")
    axes.set_xscale("logit", use_overline=False)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    looks = [(head, colour, "o") for head, colour in colours.items()]
    looks += [(policy, MUTED, marker) for policy, marker in markers.items()]
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, c, m in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    saved(figure, out / "exactness.png")


def _setting(results: Results) -> dict:
    """The setting of the first label: its names also where other columns have them too."""
    return results.config(next(iter(results.columns)))["setting"] | results.first


def _of_the_block(results: Results) -> dict:
    told = _setting(results)
    return told | {"megabytes": 4 * CLASSES * told["examples"] * told["directions"] / 2**20}


def _name(row: dict) -> str:
    if row["method"] != KEPT:
        return row["method"]
    return f"{row['kept']}, {row['kept_by']}{', tuned' if row['tuned'] else ''}"


def _strength(row: dict) -> str:
    return "" if row["strength"] is None else f"{row['strength']:g}"


def _mebibytes(one: Results) -> str:
    size = one.final("bytes")
    return f"{size.mean / 2**20:.3f}" if size and size.mean else ""


def _small(summary: Summary | None, digits: int = 2) -> str:
    return "–" if summary is None else f"{summary.mean:.{digits}g}"


def _decimals(summary: Summary | None) -> str:
    return "–" if summary is None else f"{summary.mean:.3f}"


def _count(one: Results) -> int:
    accuracy = one.final("accuracy")
    return accuracy.n if accuracy else 0
