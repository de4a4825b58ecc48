"""The tables and the figure of the soft and hard experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.soft_hard.experiment import FLAT, HARD, NAIVE, TRUE
from benchmarks.harness.plots import COLOURS, MUTED, new_figure, saved, tidy
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.harness.results import Results

TITLES = {"permuted_digits": "Permuted digits", "split_digits_domain": "Split digits, domain-incremental"}
MEASURES = ("past", "present", "average")
METHODS = (HARD, FLAT, TRUE)
DRAWN = {FLAT: (COLOURS[0], "o"), TRUE: (COLOURS[1], "s")}
TEXT = """One set of subspaces, three ways to keep out of it. Each task leaves the k top directions V of its Fisher,
estimated on the same examples in all three.

- *hard*: `OrthogonalProjection` with `Rank(k)`: no step moves along them.
- *soft, flat*: `CurvatureEWC` with `FlatSpectrum(LowRank(Rank(k)))` and `Accumulate()`: all of them as stiff as the
  sharpest, λ ½ λ_max ‖V δ‖² for each task from its own anchor.
- *soft, true*: the same with `LowRank(Rank(k))`: each as stiff as past loss is along it.

*past* is the mean accuracy at the end on all tasks but the last; *present* that on each task but the first just after
it was trained; *average* that on all tasks at the end; *moved* the mean distance ‖θ_t − θ_(t−1)‖ by which a task but
the first moves the parameters. Expected: the projection keeps more of the past and learns less as k grows; the flat
penalty goes from Naive (λ → 0) towards the projection; and the true spectrum gives way along weaker directions, so that
it needs a larger λ and loses less of the present. The projection is not its limit under Adam, which divides each step
by the size of the whole gradient, that of the penalty included: a strong penalty also slows what is free, and less is
moved.
Every strength is shown, so nothing here is chosen on the seeds that are reported. Mean ± standard
deviation over n seeds."""


def report(results: Results, out: Path) -> str:
    """A section for each stream, and one figure."""
    sections = [_section(TITLES[stream], part) for stream, part in results.by("stream")]
    _figure(results, out)
    return "\n\n".join(["# Soft against hard", TEXT, *sections, "![Past against present](soft_hard.png)"])


def _section(title: str, results: Results) -> str:
    rows: list[list[Cell]] = []
    for one in results.each():
        found = [one.final(measure) for measure in (*MEASURES, "moved")]
        rows.append([_name(one), *found, found[0].n if found[0] else 0])
    setting = results.first
    drawn = "all" if setting["examples"] is None else f"{setting['examples']}"
    text = (
        f"{setting['experiences']} tasks of {setting['steps']} steps with batches of {setting['batch']}, MLP "
        f"64-100-{setting['outputs']}, Adam at {setting['rate']:g}; Fisher of {drawn} examples of each task."
    )
    columns = [Column("method"), *(Column(measure, 3, max) for measure in MEASURES), Column("moved", 2), Column("n")]
    return f"## {title}\n\n{text}\n\n{table(columns, rows)}\n\n{_best(results)}"


def _best(results: Results) -> str:
    """For each rank the projection beside the best strength of each penalty, by the average."""
    lines = []
    for rank in sorted(_ranks(results)):
        found = []
        for method in METHODS:
            averages = [
                (average.mean, one.first["strength"] or 0.0)
                for one in results.where(rank=rank, method=method).each() if (average := one.final("average"))
            ]  # fmt: skip
            if averages:
                mean, strength = max(averages)
                found.append(f"{method} {mean:.3f}" + (f" at λ = {strength:g}" if strength else ""))
        lines.append(f"- k = {rank}: {', '.join(found)}")
    head = "The best average at every k; the penalties' is picked after the fact, on the seeds shown, and so flattered:"
    return "\n".join([head, "", *lines])


def _ranks(results: Results) -> list[int]:
    return [rank for rank, _ in results.where(rank=bool).by("rank")]


def _name(results: Results) -> str:
    row = results.first
    if row["rank"] is None:
        return row["method"]
    strength = "" if row["strength"] is None else f", λ = {row['strength']:g}"
    return f"k = {row['rank']}, {row['method']}{strength}"


def _figure(results: Results, out: Path) -> None:
    streams, ranks = dict(results.by("stream")), sorted(_ranks(results))
    figure = new_figure(2.9 * max(1, len(ranks)) + 0.6, 3.0 * len(streams) + 0.7)
    panels = figure.subplots(len(streams), max(1, len(ranks)), squeeze=False, sharex="row", sharey="row")
    for axes_row, (stream, part) in zip(panels, streams.items()):
        for axes, rank in zip(axes_row, ranks):
            _draw(axes, part.where(rank=lambda own, rank=rank: own in (rank, None)))
            tidy(axes, f"{TITLES[stream].partition(',')[0]}, k = {rank}")
            axes.set_xlabel("accuracy on the present")
        axes_row[0].set_ylabel("accuracy on the past")
    handles, names = panels[0][0].get_legend_handles_labels()
    title = "lines: λ from weak (small marks) to strong (large)"
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9,
                  title=title, title_fontsize=9)
    saved(figure, out / "soft_hard.png")


def _draw(axes: Axes, results: Results) -> None:
    """The fronts of both penalties over their strengths, the projection and Naive."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in sorted(results.each(), key=lambda one: one.first["strength"] or 0.0):
        past, present = one.final("past"), one.final("present")
        if past and present:
            points.setdefault(one.first["method"], []).append((present.mean, past.mean))
    for method, (colour, marker) in DRAWN.items():
        if method in points:
            axes.plot(*zip(*points[method]), color=colour, linewidth=1.2, label=method)
            for place, point in enumerate(points[method]):
                axes.plot(*point, color=colour, marker=marker, markersize=3 + 1.2 * place, linestyle="")
    for method, colour, marker in ((HARD, COLOURS[2], "*"), (NAIVE, MUTED, "X")):
        if method in points:
            axes.plot(*points[method][0], color=colour, marker=marker, markersize=13 if method == HARD else 8,
                      linestyle="", label=method)
