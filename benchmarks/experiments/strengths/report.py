"""The tables of how λ was chosen, one for each stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import Dots, plot_dots
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLE = "# How λ is chosen"
TEXT = """\
Five tasks. Every learner of a seed starts from the same weights and sees the same training images. *by evidence*:
`strength=Evidence()`, from λ = 1, or `Evidence(first=100)`. *on the first k tasks*: `choose_strength`, which learns
them at 100 and at the four strengths that `suggest_strength` gives after that, keeps the best on 500 held-out images of
each (30 in all in a quick run), and goes on with it; *on all tasks* is the same with all five, which no learner has
that meets them one after another. *tuned on another seed*: the best decade from 0.1 to 1e5 on seed 1000, by its
held-out images (`--part tune`).

*λ* is that after the last task, its geometric mean over seeds. *runs* is what was trained for it, in runs of the whole
stream. Kronecker factors are one pair (`PartialTraces()`). Mean ± standard deviation over n seeds."""
TERMS = """\
The evidence of the second of two tasks, trained with λ: log Z = fit + prior + volume, with the fit −N L of its N
images, the prior −½ N λ D of how far it has moved what the past holds, and the volume −½ Σ log(1 + μ/λ). *determined*
is γ, of so many *directions* of the past, and *next* the λ that `Evidence()` takes for the third task. *first* and
*second* are test accuracies on the two tasks at the end. Mean ± standard deviation over n seeds."""
SAID = "{train:,} images of {images} a task, {steps} steps of {batch} with Adam at {rate:g}, {structure}(), {policy}()."


def report(results: Results, out: Path) -> str:
    """Markdown with a table and a figure for each stream, from whatever has finished."""
    if "fit" in results.metrics:
        pairs = ([f"## {stream}", _terms(one)] for stream, one in results.by("stream"))
        return "\n\n".join([TITLE, TERMS, *(part for pair in pairs for part in pair)])
    parts, panels = [TITLE, TEXT], []
    for stream, found in results.by("stream"):
        setting = found.first
        named = {one.first["name"]: one.final("average_accuracy") for one in found.each()}
        panels.append(Dots(named, "average accuracy", stream))
        parts += [f"## {stream}", SAID.format_map(setting), _table(found)]
    labels = list(dict.fromkeys(found.first["name"] for found in results.each()))
    plot_dots(out / "strengths.png", panels, labels=labels)
    return "\n\n".join([*parts, "![Accuracy by how λ is chosen](strengths.png)"])


def _table(results: Results) -> str:
    columns = [Column("λ chosen"), Column("λ"), Column("average accuracy", 3, max), Column("runs", 1), Column("n")]
    rows: list[list[Cell]] = []
    for one in results.each():
        accuracy, strength = one.final("average_accuracy"), one.final("log_strength")
        shown = None if strength is None else f"{10**strength.mean:.3g}"
        runs = one.final("trained")
        rows.append([one.first["name"], shown, accuracy, runs and runs.mean, accuracy.n if accuracy else 0])
    return table(columns, rows)


COUNTED = {  # by title, the metrics of which the mean says enough
    "log Z": "log_evidence", "fit": "fit", "prior": "prior", "volume": "volume", "determined": "determined",
    "directions": "directions", "next": "next",
}  # fmt: skip


def _terms(results: Results) -> str:
    columns = [Column("λ"), *(Column(title, 0) for title in COUNTED), Column("first"), Column("second"), Column("n")]
    rows: list[list[Cell]] = []
    for one in results.each():
        found = [one.final(metric) for metric in COUNTED.values()]
        ends = [one.final(f"accuracy/task_{task}") for task in range(2)]
        means = [summary.mean if summary else None for summary in found]
        rows.append([one.first["name"], *means, *ends, ends[0].n if ends[0] else 0])
    return table(columns, rows)
