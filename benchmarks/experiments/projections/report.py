"""The table and the figure of the permuted MNIST experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.projections.experiment import EWC, GPM, MULTITASK, OGD
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.results import Summary
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results

TITLE = "# Orthogonal projections on permuted MNIST"
PAPERS = {"images": "mnist", "tasks": 10, "size": 60_000, "epochs": 5, "momentum": 0.0}  # of its setting
PUBLISHED = {EWC: "89.97", MULTITASK: "96.70", GPM: "93.91 ± 0.16", OGD: "82.56"}  # by family, for any rank
EXPLANATION = """\
*GPM* keeps the span of each layer's inputs, with the thresholds 0.95 for the first layer and 0.99 for the others, of
300 examples of each task; *eigenspace* the top eigenvectors of the Fisher, so many a task, in one basis or by layers;
*OGD* the gradients of the true output of so many examples a task. All project the step, which is for plain SGD what
the projection of the gradient is, but for rounding. In the rows with momentum 0.9 (the learning rate is a tenth, so
that the effective one is the same) the two differ: the buffer still holds gradients of the task before. Strengths of
EWC are tuned on seeds from 1000 on (`--part tune`). Replay draws a batch of its memory beside each batch. Every task
has a permutation, the first too. *multitask* learns all tasks at once.

*backward transfer* is the mean over tasks of the final accuracy less the accuracy just after learning; *accuracy when
learned* is the mean of the latter. *used* is the part of all dimensions that is closed at the end, *energy* the part of
each task's curvature (or squared inputs) that its own directions hold; *leak* the part of the changes during the last
task that lay in what was protected before it. *as published* are accuracies in % from Table 1 of Saha et al. 2021,
quoted: their own runs, 5 seeds, with strengths and memories of their own (A-GEM there: 83.56; GPM's backward transfer:
−0.03).
Mean ± standard deviation over n seeds."""


SETTING = (
    "{tasks} tasks on {images}, {size:,} training images each (all where there are fewer), every test image; a ReLU "
    "network with two hidden layers of {hidden} without biases, one head, SGD at {rate:g}, batches of {batch}, "
    "{epochs} epochs a task."
)


def report(results: Results, out: Path) -> str:
    """Markdown with one figure, from whatever has finished."""
    _figure(results, out)
    known = {one.label: one.first.get("strength") for one in results.each()}  # no column where no row has one
    strengths = "; ".join(f"{label}: λ = {strength:g}" for label, strength in known.items() if strength is not None)
    parts = [TITLE, SETTING.format_map(results.first), EXPLANATION, _table(results)]
    parts += [f"Strengths: {strengths}."] if strengths else []
    figure = "![Accuracy after each task, final accuracy of each task, and protected dimensions](projections.png)"
    return "\n\n".join([*parts, figure])


def _table(results: Results) -> str:
    columns = [
        Column("method"), Column("average accuracy", 4, max), Column("as published"), Column("backward transfer", 4),
        Column("accuracy when learned", 4), Column("used", 3), Column("energy", 3), Column("basis MiB", 1),
        Column("leak"), Column("train min", 1), Column("n"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for one in results.each():
        accuracy, leak, row = one.final("average_accuracy"), one.final("leakage"), one.first
        like_the_paper = all(row[name] == value for name, value in PAPERS.items())
        rows.append([
            one.label, accuracy, PUBLISHED.get(row["family"], "") if like_the_paper else "",
            *(one.final(name) for name in ("backward_transfer", "learned", "used", "energy")),
            _scaled(one.final("basis_bytes"), 2**20), leak and f"{leak.mean:.0e}", _scaled(one.final("seconds"), 60),
            accuracy.n if accuracy else 0,
        ])  # fmt: skip
    return table(columns, rows)


def _scaled(value: Summary | None, unit: float) -> Summary | None:
    if value is None:
        return None
    return Summary(value.mean / unit, None if value.std is None else value.std / unit, value.n)


def _figure(results: Results, out: Path) -> None:
    panels = []
    for metric, ylabel, title in (
        ("accuracy_seen", "mean accuracy", "on the tasks so far, after each task"),
        ("final_accuracy", "accuracy", "on each task, after the last"),
        ("used", "part of all dimensions", "protected, after each task"),
    ):
        curves = {one.label: curve for one in results.each() if (curve := one.curve(metric))}
        panels.append(Curves(curves, ylabel, title))
    matter = [next(iter(family.columns)) for _, family in results.by("family")]
    plot_curves(out / "projections.png", panels, xlabel="task", labels=results.labels, matter=matter)
