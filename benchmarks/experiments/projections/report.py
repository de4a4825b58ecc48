"""The table and the figure of the permuted MNIST experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.summary import Summary
from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLE = "# Orthogonal projections on permuted MNIST"
PAPERS = {"images": "mnist", "tasks": 10, "examples": 60_000, "epochs": 5, "momentum": 0.0}  # of its setting
PUBLISHED = {  # by method, and by what it projects out, the curvature or else the protection
    ("AvalancheEWC", None): "89.97",
    ("Multitask", None): "96.70",
    ("Projected", "InputSpace"): "93.91 ± 0.16",
    ("Projected", "OutputGradient"): "82.56",
}
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


def report(results: Results, out: Path) -> str:
    """Markdown with one figure, from whatever has finished."""
    setting: dict = next((results.config(label)["setting"] for label in results.labels if results.config(label)), {})
    _figure(results, out)
    figure = "![Accuracy after each task, final accuracy of each task, and protected dimensions](projections.png)"
    parts = [TITLE, _setting(setting), EXPLANATION, _table(results), _strengths(results), figure]
    return "\n\n".join(part for part in parts if part)


def _setting(setting: dict[str, Any]) -> str:
    h = setting["hidden"]
    return (
        f"{setting['tasks']} tasks on {setting['images']}, {setting['examples']:,} training images each (all where "
        f"there are fewer), every test image; a ReLU network with two hidden layers of {h} without biases, one head, "
        f"SGD at {setting['rate']:g}, batches of {setting['batch']}, {setting['epochs']} epochs a task."
    )


def _table(results: Results) -> str:
    columns = [
        Column("method"), Column("average accuracy", 4, max), Column("as published"), Column("backward transfer", 4),
        Column("accuracy when learned", 4), Column("used", 3), Column("energy", 3), Column("basis MiB", 1),
        Column("leak"), Column("train min", 1), Column("n"),
    ]
    rows: list[list] = []
    for label in results.labels:
        accuracy = results.final("average_accuracy", label)
        values = [results.final(name, label) for name in ("backward_transfer", "learned", "used", "energy")]
        rows.append([
            label, accuracy, _published(results.config(label)), *values,
            _scaled(results.final("basis_bytes", label), 2**20), _leak(results.final("leakage", label)),
            _scaled(results.final("seconds", label), 60), accuracy.n if accuracy else 0,
        ])
    return table(columns, rows)


def _published(config: dict[str, Any]) -> str:
    """The accuracy of the method in the paper, for any rank; nothing beside a setting that is not the paper's."""
    if not config or any(config["setting"][name] != value for name, value in PAPERS.items()):
        return ""
    protect = config["method"].get("protect", {})
    return PUBLISHED.get((config["method"]["class"], protect.get("curvature", protect).get("class")), "")


def _strengths(results: Results) -> str:
    known = {label: results.config(label).get("method", {}).get("strength") for label in results.labels}
    found = [f"{label}: λ = {strength:g}" for label, strength in known.items() if strength is not None]
    return f"Strengths: {'; '.join(found)}." if found else ""


def _leak(leak: Summary | None) -> str | None:
    return None if leak is None else f"{leak.mean:.0e}"


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
        curves = {label: results.curve(metric, label) for label in results.labels}
        panels.append(Curves({label: curve for label, curve in curves.items() if curve}, ylabel, title))
    plot_curves(out / "projections.png", panels, xlabel="task", labels=results.labels)
