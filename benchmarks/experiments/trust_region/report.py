"""The tables and the figure of the trust region experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import new_figure, saved, tidy
from benchmarks.harness.styles import COLOURS, MUTED
from benchmarks.harness.summary import Summary
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLES = {
    "sine": "Sine boundary, 9 slices",
    "split_digits": "Split digits, class-incremental",
    "permuted_digits": "Permuted digits",
    "split_mnist": "Split MNIST, class-incremental",
    "split_mnist_domain": "Split MNIST, domain-incremental",
}
TRIALS = {
    "sine": "First trials (8 tasks): per task 0.67 to 0.77, adaptive 0.90 with 12 refreshes in all and 0.925 with 26, "
            "replay 0.94.",
    "split_digits": "First trials: per task 0.20, adaptive 0.90 with 3 refreshes a task and 0.925 with 5 or 6, replay "
                    "0.93.",
    "split_mnist": "First trials: plain 0.20, adaptive 0.71 with 4 refreshes a task and 0.74 with 8, replay 0.79.",
}
PER_TASK = ("refresh per task", "refresh per task, slope")
EXPLANATION = """Every method stores the same examples of each task.

- *refresh per task* estimates GGN curvature anew at each task's end; with *slope* the gradient of past loss there too;
  *damped* as adaptive is.
- *adaptive τ* besides draws a new picture whenever the loss of the stored examples differs from it by more than τ times
  itself, checked every 5 steps.
- *replay* trains on the stored examples themselves, all of them at every step.

Strength is 1 for replay, adaptive and damped (the sum of all tasks' losses) and tuned on seeds from 1000 on for the
others. *refreshes* counts those during a task, per task after the first. *gap closed* is the way from the better
undamped refresh per task (0) to replay (1), of means. *just learned* is the accuracy on each task at its end. *time* is
training time in that of Naive in the same seed. Mean ± standard deviation over n seeds."""


def report(results: Results, out: Path) -> str:
    """A section for each stream, and one figure."""
    streams = list(dict.fromkeys(label.partition(", ")[0] for label in results.labels))
    _figure(results, streams, out)
    sections = [_section(results, stream) for stream in streams]
    parts = ["# Refreshing where the picture breaks", EXPLANATION, *sections]
    return "\n\n".join([*parts, "![Accuracy against refreshes](trust_region.png)"])


def _section(results: Results, stream: str) -> str:
    columns = [
        Column("method"), Column("accuracy", 3, max), Column("gap closed", 2), Column("refreshes", 1),
        Column("just learned", 3), Column("time", 2), Column("stored KiB", 0), Column("n"),
    ]
    names = [label.partition(", ")[2] for label in results.labels if label.startswith(f"{stream}, ")]
    configs = (results.config(f"{stream}, {name}") for name in names)
    setting: dict = next((config["setting"] for config in configs if config), {})
    rows = [_row(results, stream, name) for name in names]
    text = (
        f"{setting['experiences']} tasks of {setting['steps']} steps with batches of {setting['batch']}, one hidden "
        f"layer of 100 ReLU units, Adam at {setting['rate']:g}; {setting['memory']:.2%} of each task's examples "
        "stored. "
        if setting
        else ""
    )
    return f"## {TITLES[stream]}\n\n{text}{TRIALS.get(stream, '')}\n\n{table(columns, rows)}"


def _row(results: Results, stream: str, name: str) -> list[Cell]:
    label = f"{stream}, {name}"
    found = {metric: results.final(metric, label) for metric in ("average_accuracy", "refreshes", "learned")}
    strength = results.config(label).get("method", {}).get("strength")
    tuned = "" if strength is None or strength == 1 else f" (λ = {strength:g})"
    stored, accuracy = results.final("stored_bytes", label), found["average_accuracy"]
    return [
        name + tuned,
        accuracy,
        closed(results, stream, name),
        None if found["refreshes"] is None else found["refreshes"].mean,
        found["learned"],
        slowdown(results, label, f"{stream}, Naive"),
        stored and stored.mean / 1024,
        accuracy.n if accuracy else 0,
    ]


def closed(results: Results, stream: str, name: str) -> float | None:
    """(accuracy − per task) / (replay − per task), with the better of the refreshes per task."""
    own, replay, *per_task = (
        results.final("average_accuracy", f"{stream}, {other}") for other in (name, "replay", *PER_TASK)
    )
    known = [summary.mean for summary in per_task if summary]
    if own is None or replay is None or not known or replay.mean == max(known):
        return None
    return (own.mean - max(known)) / (replay.mean - max(known))


def slowdown(results: Results, label: str, reference: str) -> float | None:
    """The mean over seeds of the ratio of training times."""
    own = {row["seed"]: row["value"] for row in results.select("seconds", label)}
    base = {row["seed"]: row["value"] for row in results.select("seconds", reference)}
    ratios = [own[seed] / base[seed] for seed in own.keys() & base.keys()]
    return sum(ratios) / len(ratios) if ratios else None


def _figure(results: Results, streams: list[str], out: Path) -> None:
    figure = new_figure(3.6 * len(streams) + 0.6, 3.8)
    panels = figure.subplots(1, len(streams), squeeze=False)[0]
    for axes, stream in zip(panels, streams):
        tidy(axes, TITLES[stream])
        axes.set_xlabel("refreshes per task")
        for name, colour in (("replay", COLOURS[2]), ("refresh per task", COLOURS[1]), ("Avalanche's EWC", MUTED)):
            known = results.final("average_accuracy", f"{stream}, {name}")
            if known:
                axes.axhline(known.mean, color=colour, linestyle="--", linewidth=1.4, label=name)
        points = _points(results, stream)
        if points:
            counts, values = zip(*points)
            axes.errorbar(
                counts, [v.mean for v in values], yerr=[v.std or 0.0 for v in values], color=COLOURS[0], marker="o",
                capsize=3, markersize=5, linewidth=1.6, label="adaptive, loose to tight",
            )
    panels[0].set_ylabel("accuracy on all tasks")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    saved(figure, out / "trust_region.png")


def _points(results: Results, stream: str) -> list[tuple[float, Summary]]:
    """(refreshes, accuracy) of each tolerance without a cap, in the order of refreshes."""
    names = [label for label in results.labels if label.startswith(f"{stream}, adaptive ") and label.count(",") == 1]
    found = ((results.final("refreshes", label), results.final("average_accuracy", label)) for label in names)
    return sorted(((count.mean, value) for count, value in found if count and value), key=lambda point: point[0])
