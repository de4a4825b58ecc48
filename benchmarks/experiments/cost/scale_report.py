"""The tables and the figure of how prices grow with the numbers of parameters and of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.experiments.cost.scale import MATRICES, MOST_BYTES, MOST_SECONDS, VECTORS
from benchmarks.harness.plots import legend, name_the_rest, new_figure, saved, styles, tidy
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

FITTED = 3  # the largest sizes, and numbers of tasks
MATTER = (
    "diagonal", "Kronecker, list", "Kronecker, one pair", "Kronecker, one pair cut to 20", "EKFAC, one pair", "top 10",
    "projection, 10 directions",
)  # fmt: skip
QUANTITIES = {"absorb_seconds": "absorb", "step_seconds": "step", "bytes": "bytes"}
AXES = {"size": "P", "tasks": "tasks"}
HEAD = """\
# How the price of the past grows

Networks hidden-hidden-hidden-10, P parameters in all, with the exact empirical Fisher of {examples} examples of each
task. Absorb: the second task, in seconds of processor time; step: one of plain SGD on as many examples with the past of
one task, as a ratio to one without; held: the matrix or basis with its anchor. By tasks: {few} examples each, at
{hidden:,} units ({dense:,} where matrices are dense). Medians of rounds in turn with their reference, one thread.

A size at which {matrices} matrices and {vectors} vectors of P numbers, as an absorb holds at its peak, would be over
{limit} GiB, or decompositions and products of one task over {seconds} s, is not run: its cell says what is foreseen of
one matrix, or of the time."""
EXPONENTS = """\
## Exponents

Of power laws in P and in the number of tasks, by least squares of logarithms over the {fitted} largest values that were
run; in brackets the smallest and the largest between two neighbours of all. Seconds of a step have the step itself in
them."""
SIZES = """\
## By size

A step with the past of one task in plain ones, and what is held of it."""
TASKS = """\
## At the largest

Absorbing one more task in passes of its gradient, and its peak of memory above what was there, in vectors of P numbers
(sampled every 50 ms, so of the largest P alone); a step in plain ones, and what is held, of {most} tasks."""


@dataclass(frozen=True)
class Power:
    """The exponent b of y = a xᵇ, and the smallest and largest between two neighbours."""

    exponent: float
    least: float
    most: float

    def __str__(self) -> str:
        exponent, least, most = (round(value, 2) + 0.0 for value in (self.exponent, self.least, self.most))  # no -0.00
        return f"{exponent:.2f} ({least:.2f} to {most:.2f})"


def fitted(points: Sequence[tuple[float, float]], count: int = FITTED) -> Power | None:
    """By least squares of logarithms over the last `count` points (x, y), in rising order of x; None of fewer than two
    points.

    >>> str(fitted([(1, 2), (10, 20), (100, 200), (1000, 20000)]))
    '1.50 (1.00 to 2.00)'
    """
    known = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(known) < 2:
        return None
    x, y = np.array(known).T
    slopes = np.diff(y) / np.diff(x)
    return Power(float(np.polyfit(x[-count:], y[-count:], 1)[0]), float(slopes.min()), float(slopes.max()))


def scale_report(results: Results, out: Path) -> str:
    """Markdown with one figure."""
    _figure(results, out / "scale.png")
    configs = [one.first for one in results.each()]
    counts = max(configs[0]["counts"])
    words = {
        "examples": configs[0]["examples"], "few": configs[0]["few"], "hidden": max(row["hidden"] for row in configs),
        "dense": min(row["hidden"] for row in configs), "limit": MOST_BYTES // 2**30, "seconds": MOST_SECONDS,
        "matrices": MATRICES, "vectors": VECTORS,
    }  # fmt: skip
    parts = [
        HEAD.format(**words), EXPONENTS.format(fitted=FITTED), _exponents(results), "![Prices by size and by tasks]"
        "(scale.png)", SIZES, _sizes(results), TASKS.format(most=counts), _largest(results),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _points(results: Results, metric: str) -> list[tuple[float, float]]:
    """Means over seeds at each step of a label."""
    return [(step, summary.mean) for step, summary in results.curve(metric)]


def _exponents(results: Results) -> str:
    titles = [f"{title}, {axis}" for axis in AXES.values() for title in QUANTITIES.values()]
    rows: list[list[Cell]] = []
    for one in results.each():
        laws = (fitted(_points(one, f"{axis}/{quantity}")) for axis in AXES for quantity in QUANTITIES)
        rows.append([one.label, *(str(law) if law else None for law in laws)])
    return table([Column("kept"), *(Column(title) for title in titles)], rows)


def _sizes(results: Results) -> str:
    sizes = sorted({row["step"] for row in results.select("size/foreseen")})
    rows: list[list[Cell]] = []
    for one in results.each():
        steps, held = (dict(_points(one, f"size/{what}")) for what in ("step_ratio", "bytes"))
        reasons = {row["step"]: f"{row['reason']}, not run" for row in one.select("size/left_out")}
        cells = (f"{steps[p]:.2f}, {_bytes(held[p])}" if p in steps else reasons.get(p) for p in sizes)
        rows.append([one.label, *cells])
    return table([Column("kept"), *(Column(f"P = {_round(size)}") for size in sizes)], rows)


def _largest(results: Results) -> str:
    columns = [
        Column("kept"), Column("largest P"), Column("passes", 1), Column("seconds", 2), Column("peak", 1),
        Column("passes, tasks", 1), Column("step, tasks", 2), Column("held, tasks"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for one in results.each():
        at = {axis: dict(_points(one, f"{axis}/bytes")) for axis in AXES}
        cells: list[Cell] = [one.label]
        for axis, names in {"size": ("absorb_passes", "absorb_seconds", "peak"),
                            "tasks": ("absorb_passes", "step_ratio", "bytes")}.items():  # fmt: skip
            most = max(at[axis], default=None)
            values = [dict(_points(one, f"{axis}/{name}")).get(most or 0) for name in names]
            if axis == "size":
                seconds, peak = values[1:]
                vectors = peak / 4 / most if most and peak and seconds and seconds > 0.2 else None
                cells += [None if most is None else _round(most), values[0], seconds, vectors]
            else:
                cells += [*values[:2], None if values[2] is None else _bytes(values[2])]
        rows.append(cells)
    return table(columns, rows)


def _round(size: float) -> str:
    """Its power of ten.

    >>> _round(999_690), _round(2_410)
    ('1e6', '2e3')
    """
    digits, power = f"{size:.0e}".split("e")
    return f"{digits}e{int(power)}"


def _bytes(count: float) -> str:
    """In MiB, or in GiB from one on."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _figure(results: Results, path: Path) -> None:
    """Absorb, step and bytes, above by size and below by tasks."""
    chosen = styles(results.labels, MATTER)
    figure = new_figure(12.5, 8.2)
    panels = {"absorb_seconds": "absorbing a task (s)", "step_ratio": "step (× a plain one)", "bytes": "held (MiB)"}
    for axes_of, (axis, over) in zip(figure.subplots(2, 3), {"size": "parameters", "tasks": "past tasks"}.items()):
        for axes, (metric, ylabel) in zip(axes_of, panels.items()):
            for one in results.each():
                points = _points(one, f"{axis}/{metric}")
                scale = 2**20 if metric == "bytes" else 1
                style = chosen[one.label]
                xs, ys = [x for x, _ in points], [y / scale for _, y in points]
                axes.plot(xs, ys, linewidth=1.8 if style.matters else 1.1, **style.line)
            tidy(axes, "", over, ylabel, log_x=True, log_y=True)
    legend(figure, {label: style for label, style in chosen.items() if style.matters}, above=True)
    name_the_rest(figure, chosen)
    saved(figure, path)
