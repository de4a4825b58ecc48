"""The tables and the figure of the soft and hard experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.soft_hard import FLAT, HARD, NAIVE, TRUE
from benchmarks.harness.plots import new_figure, saved, tidy
from benchmarks.harness.styles import COLOURS, MUTED
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
    known = [label for label in results.labels if results.config(label)]
    streams = list(dict.fromkeys(results.config(label)["setting"]["stream"] for label in known))
    _figure(results, known, streams, out)
    sections = [_section(results, known, stream) for stream in streams]
    return "\n\n".join(["# Soft against hard", TEXT, *sections, "![Past against present](soft_hard.png)"])


def _section(results: Results, labels: list[str], stream: str) -> str:
    own = [label for label in labels if results.config(label)["setting"]["stream"] == stream]
    setting = results.config(own[0])["setting"]
    rows: list[list[Cell]] = []
    for label in own:
        found = [results.final(measure, label) for measure in (*MEASURES, "moved")]
        rows.append([_name(results.config(label)), *found, found[0].n if found[0] else 0])
    drawn = "all" if setting["examples"] is None else f"{setting['examples']}"
    text = (
        f"{setting['experiences']} tasks of {setting['steps']} steps with batches of {setting['batch']}, MLP "
        f"64-100-{setting['outputs']}, Adam at {setting['rate']:g}; Fisher of {drawn} examples of each task."
    )
    columns = [Column("method"), *(Column(measure, 3, max) for measure in MEASURES), Column("moved", 2), Column("n")]
    return f"## {TITLES[stream]}\n\n{text}\n\n{table(columns, rows)}\n\n{_seen(results, own)}"


def _seen(results: Results, labels: list[str]) -> str:
    """For each rank the projection beside the best strength of each penalty, by the average."""
    best: dict[tuple[int, str], tuple[float, str]] = {}
    for label in labels:
        config, average = results.config(label), results.final("average", label)
        if config["rank"] is not None and average is not None:
            strength = "" if config["strength"] is None else f" at λ = {config['strength']:g}"
            key = config["rank"], config["method"]
            best[key] = max(best.get(key, (0.0, "")), (average.mean, strength))
    lines = []
    for rank in sorted({rank for rank, _ in best}):
        found = [(method, *best[rank, method]) for method in METHODS if (rank, method) in best]
        lines.append(f"- k = {rank}: " + ", ".join(f"{method} {mean:.3f}{at}" for method, mean, at in found))
    head = "The best average at every k; the penalties' is picked after the fact, on the seeds shown, and so flattered:"
    return "\n".join([head, "", *lines])


def _name(config: dict[str, Any]) -> str:
    if config["rank"] is None:
        return config["method"]
    strength = "" if config["strength"] is None else f", λ = {config['strength']:g}"
    return f"k = {config['rank']}, {config['method']}{strength}"


def _figure(results: Results, labels: list[str], streams: list[str], out: Path) -> None:
    configs = {label: results.config(label) for label in labels}
    ranks = sorted({config["rank"] for config in configs.values() if config["rank"]})
    figure = new_figure(2.9 * max(1, len(ranks)) + 0.6, 3.0 * len(streams) + 0.7)
    panels = figure.subplots(len(streams), max(1, len(ranks)), squeeze=False, sharex="row", sharey="row")
    for axes_row, stream in zip(panels, streams):
        for axes, rank in zip(axes_row, ranks):
            here = {
                label: config for label, config in configs.items()
                if config["setting"]["stream"] == stream and config["rank"] in (rank, None)
            }
            _draw(axes, results, here)
            tidy(axes, f"{TITLES[stream].partition(',')[0]}, k = {rank}")
            axes.set_xlabel("accuracy on the present")
        axes_row[0].set_ylabel("accuracy on the past")
    handles, names = panels[0][0].get_legend_handles_labels()
    title = "lines: λ from weak (small marks) to strong (large)"
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9,
                  title=title, title_fontsize=9)
    saved(figure, out / "soft_hard.png")


def _draw(axes: Axes, results: Results, configs: dict[str, dict[str, Any]]) -> None:
    """The fronts of both penalties over their strengths, the projection and Naive."""
    points: dict[str, list[tuple[float, float]]] = {}
    for label, config in sorted(configs.items(), key=lambda item: item[1]["strength"] or 0.0):
        past, present = results.final("past", label), results.final("present", label)
        if past and present:
            points.setdefault(config["method"], []).append((present.mean, past.mean))
    for method, (colour, marker) in DRAWN.items():
        if method in points:
            axes.plot(*zip(*points[method]), color=colour, linewidth=1.2, label=method)
            for place, point in enumerate(points[method]):
                axes.plot(*point, color=colour, marker=marker, markersize=3 + 1.2 * place, linestyle="")
    for method, colour, marker in ((HARD, COLOURS[2], "*"), (NAIVE, MUTED, "X")):
        if method in points:
            axes.plot(*points[method][0], color=colour, marker=marker, markersize=13 if method == HARD else 8,
                      linestyle="", label=method)
