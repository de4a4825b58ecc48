"""The tables and the figure of the trust region experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.trust_region.experiment import EWC, NAIVE, PER_TASK, REPLAY, WITH_SLOPE
from benchmarks.experiments.trust_region.frontier import REPLAY as REPLAYED
from benchmarks.harness.plots import COLOURS, MARKERS, MUTED, new_figure, saved, tidy
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import mean_ratio

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
EXPLANATION = """Every method stores the same examples of each task.

- *refresh per task* estimates GGN curvature anew at each task's end; with *slope* the gradient of past loss there too;
  *damped* as adaptive is.
- *adaptive τ* besides estimates a new quadratic model whenever the loss of the stored examples differs from it by more
  than τ times itself, checked every 5 steps.
- *replay* trains on the stored examples themselves, all of them at every step.

Strength is 1 for replay, adaptive and damped (the sum of all tasks' losses) and tuned on seeds from 1000 on for the
others. *refreshes* counts those during a task, per task after the first. *gap closed* is 0 for the better undamped
refresh per task and 1 for replay, of means. *just learned* is the accuracy on each task at its end. *time* is training
time divided by that of Naive in the same seed. Mean ± standard deviation over n seeds."""


def report(results: Results, out: Path) -> str:
    """A section for each stream that has run, and one figure; of the frontier its table and two figures."""
    if results.columns and "images" in results.first:
        return frontier_report(results, out)
    streams = dict(results.by("stream"))
    sections = [_section(stream, part) for stream, part in streams.items()]
    if streams:
        _figure(streams, out)
        sections.append("![Accuracy against refreshes](trust_region.png)")
    return "\n\n".join(["# Refreshing where the quadratic model breaks", EXPLANATION, *sections])


def _section(stream: str, results: Results) -> str:
    columns = [
        Column("method"), Column("accuracy", 3, max), Column("gap closed", 2), Column("refreshes", 1),
        Column("just learned", 3), Column("time", 2), Column("stored KiB", 0), Column("n"),
    ]  # fmt: skip
    setting = results.first
    text = (
        f"{setting['experiences']} tasks of {setting['steps']} steps with batches of {setting['batch']}, one hidden "
        f"layer of 100 ReLU units, Adam at {setting['rate']:g}; {setting['memory']:.2%} of each task's examples "
        f"stored. {TRIALS.get(stream, '')}"
    )
    return f"## {TITLES[stream]}\n\n{text}\n\n{table(columns, [_row(results, one) for one in results.each()])}"


def _row(results: Results, one: Results) -> list[Cell]:
    accuracy, refreshes, learned, stored = map(one.final, ("average_accuracy", "refreshes", "learned", "stored_bytes"))
    row = one.first
    reference = next((naive.finals("seconds") for naive in results.where(name=NAIVE).each()), {})
    strength = row.get("strength")
    return [
        row["name"] + ("" if strength in (None, 1) else f" (λ = {strength:g})"),
        accuracy,
        closed(results, row["name"]),
        refreshes and refreshes.mean,
        learned,
        mean_ratio(one.finals("seconds"), reference),
        stored and stored.mean / 1024,
        accuracy.n if accuracy else 0,
    ]


def closed(results: Results, name: str) -> float | None:
    """(accuracy − per task) / (replay − per task) of a method among the results of one stream, with the better of the
    refreshes per task. None where one of these has not run."""
    own, replay, *per_task = (_accuracy(results, other) for other in (name, REPLAY, PER_TASK, WITH_SLOPE))
    known = [accuracy for accuracy in per_task if accuracy is not None]
    if own is None or replay is None or not known or replay == max(known):
        return None
    return (own - max(known)) / (replay - max(known))


def _accuracy(results: Results, name: str) -> float | None:
    """The mean accuracy of a method of one stream."""
    found = next((one.final("average_accuracy") for one in results.where(name=name).each()), None)
    return None if found is None else found.mean


def _figure(streams: dict[str, Results], out: Path) -> None:
    figure = new_figure(3.6 * len(streams) + 0.6, 3.8)
    panels = figure.subplots(1, len(streams), squeeze=False)[0]
    for axes, (stream, results) in zip(panels, streams.items()):
        tidy(axes, TITLES[stream])
        axes.set_xlabel("refreshes per task")
        for name, colour in ((REPLAY, COLOURS[2]), (PER_TASK, COLOURS[1]), (EWC, MUTED)):
            if known := _accuracy(results, name):
                axes.axhline(known, color=colour, linestyle="--", linewidth=1.4, label=name)
        curve = results.where(tolerance=lambda own: own is not None).each()
        pairs = ((one.final("refreshes"), one.final("average_accuracy")) for one in curve)
        points = sorted(((count.mean, value) for count, value in pairs if count and value), key=lambda point: point[0])
        if points:
            counts, values = zip(*points)
            axes.errorbar(
                counts, [v.mean for v in values], yerr=[v.std or 0.0 for v in values], color=COLOURS[0], marker="o",
                capsize=3, markersize=5, linewidth=1.6, label="adaptive, loose to tight",
            )  # fmt: skip
    panels[0].set_ylabel("accuracy on all tasks")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, len(names)), frameon=False, fontsize=9)
    saved(figure, out / "trust_region.png")


FRONTIER = """Class-incremental split MNIST: {experiences} tasks of two digits, batches of {batch}, one hidden layer of
100 ReLU units, Adam at {rate:g}. *Replay* is Avalanche's, a mini-batch of stored images beside each batch of new ones.
*Adaptive refresh* has a diagonal Fisher of one sample, `RelativeError(0.2)` and `SlopeAlone(512)`; *both* add its
penalty to Replay of the images that it stores.

*s* is processor time of training on one thread, *times Replay* that in Replay's of the same seed, *KiB* what is held
beside the model at the end. Mean ± standard deviation over n seeds."""


def frontier_report(results: Results, out: Path) -> str:
    """The table of the frontier and its figures, against processor time and against bytes."""
    columns = [
        Column("images"), Column("steps"), Column("method"), Column("accuracy", 3, max), Column("s", 1),
        Column("times Replay", 2), Column("KiB", 0), Column("n"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for (images, of_memory) in results.by("images"):
        for (steps, part) in of_memory.by("steps"):
            reference = next((one.finals("processor_seconds") for one in part.where(name=REPLAYED).each()), {})
            for one in part.each():
                accuracy, seconds, held = map(one.final, ("average_accuracy", "processor_seconds", "stored_bytes"))
                rows.append([
                    f"{images:,}", steps, one.first["name"], accuracy, seconds and seconds.mean,
                    mean_ratio(one.finals("processor_seconds"), reference), held and held.mean / 1024,
                    accuracy.n if accuracy else 0,
                ])  # fmt: skip
    _frontier_figure(results, out / "frontier_seconds.png", "images", "{:,} images", "processor_seconds", 1.0, "s")
    _frontier_figure(results, out / "frontier_bytes.png", "steps", "{} steps a task", "stored_bytes", 1024.0, "KiB")
    return "\n\n".join([
        "# The frontier of accuracy against processor time and bytes", FRONTIER.format(**results.first),
        table(columns, rows), "![Accuracy against processor time](frontier_seconds.png)",
        "![Accuracy against bytes held](frontier_bytes.png)",
    ])  # fmt: skip


def _frontier_figure(
    results: Results, path: Path, panel_of: str, title: str, metric: str, unit: float, xlabel: str
) -> None:
    """A panel for each value of a column, a curve for each method through its other points."""
    parts = list(results.by(panel_of))
    figure = new_figure(3.6 * len(parts) + 0.6, 3.8)
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, (value, part) in zip(panels, parts):
        tidy(axes, title.format(value), xlabel=xlabel, log_x=True)
        for (name, own), colour, marker in zip(part.by("name"), COLOURS, MARKERS):
            pairs = ((one.final(metric), one.final("average_accuracy")) for one in own.each())
            points = sorted(((x.mean / unit, y) for x, y in pairs if x and y), key=lambda point: point[0])
            axes.errorbar(
                [x for x, _ in points], [y.mean for _, y in points], yerr=[y.std or 0.0 for _, y in points],
                color=colour, marker=marker, capsize=3, markersize=5, linewidth=1.6, label=name,
            )  # fmt: skip
    panels[0].set_ylabel("accuracy on all tasks")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, len(names)), frameon=False, fontsize=9)
    saved(figure, path)
