"""The tables and the figure of the refresh experiment: the research log's Table 1."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Summary
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results

PUBLISHED = {
    ("final", "Accumulate"): (Summary(0.688, 0.053, 0), Summary(0.654, 0.051, 0), Summary(3.382, 1.015, 0),
                              Summary(6.354, 0.334, 0)),
    ("final", "Refresh"): (Summary(0.742, 0.037, 0), Summary(0.725, 0.025, 0), Summary(0.056, 0.064, 0),
                           Summary(5.522, 0.593, 0)),
    ("trajectory", "Accumulate"): (Summary(0.668, 0.053, 0), Summary(0.662, 0.026, 0), Summary(2.845, 0.872, 0),
                                   Summary(6.379, 0.571, 0)),
    ("trajectory", "Refresh"): (Summary(0.710, 0.069, 0), Summary(0.705, 0.021, 0), Summary(0.407, 0.134, 0),
                                Summary(5.825, 0.392, 0)),
}
MEASURES = ("all_accuracy", "stored_accuracy", "kappa_abs", "gamma", "kappa", "alpha", "gamma_linear", "alpha_linear")


def report(results: Results, out: Path) -> str:
    """The log's table, both quadratic models on every trajectory, and their error as training goes on."""
    setting = results.first
    _figure(results, out, setting["steps"])
    return "\n\n".join([
        "# Refreshing the curvature: the research log's Table 1",
        f"Sine stream of {setting['experiences']} tasks, MLP 2-100-2 with ReLU (502 parameters), true Fisher, "
        f"dense, {setting['memory']:.0%} of each task's training examples stored; Adam {setting['rate']}, decay "
        f"{setting['weight_decay']}, cosine per task, {setting['steps']} steps a task, batch {setting['batch']}. "
        "κ is |κ| and γ the gradient error, means over the stored examples of all past tasks, of the quadratic model "
        "that the row trains with, without linear term; mean ± standard deviation over n seeds.",
        _table(results),
        _models(results),
        "![Error of both models](refresh.png)",
    ])  # fmt: skip


def _table(results: Results) -> str:
    columns = [
        Column("strategy"), Column("λ"), Column("all acc."), Column("stored acc."), Column("κ"), Column("γ"),
        Column("n"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for moment, title in (("final", "final step"), ("trajectory", "trajectory average")):
        for one in results.each():
            row = one.first
            model = "refresh" if row["policy"] == "Refresh" else "accumulate"  # that of the sequential one is read too
            own = [one.final(f"{moment}/{model}/{measure}") for measure in MEASURES[:4]]
            rows.append([f"{one.label}, {title}", f"{row['strength']:g}", *own, own[0].n if own[0] else 0])
            key = moment, row["policy"]
            if key in PUBLISHED and not row["gradient"]:
                rows.append([f"published: {one.label}, {title}", "?", *PUBLISHED[key], "?"])
    return table(columns, rows)


def _models(results: Results) -> str:
    columns = [
        Column("trajectory"), Column("κ accumulate"), Column("κ refresh"), Column("γ accumulate"),
        Column("γ refresh"), Column("γ refresh, linear term"), Column("α refresh, linear term"),
    ]  # fmt: skip
    names = ("accumulate/kappa_abs", "refresh/kappa_abs", "accumulate/gamma", "refresh/gamma",
             "refresh/gamma_linear", "refresh/alpha_linear")  # fmt: skip
    rows = [[one.label, *(one.final(f"trajectory/{name}") for name in names)] for one in results.each()]
    return "Both models on every trajectory, trajectory averages:\n\n" + table(columns, rows)


def _figure(results: Results, out: Path, steps: int) -> None:
    kappa, accuracy = (
        {one.label: curve for one in results.each() if (curve := one.curve(name))} for name in ("kappa_abs", "acc")
    )
    last = max((point[0] for curve in accuracy.values() for point in curve), default=0)
    marks = [float(step) for step in range(steps, int(last) + 1, steps)]
    panels = [
        Curves(accuracy, "accuracy on seen tasks", "Accuracy", marks=marks),
        Curves(kappa, "mean |κ|", "Error of the quadratic model that each strategy trains with", log=True, marks=marks),
    ]
    plot_curves(out / "refresh.png", panels, xlabel="training iteration", labels=results.labels)
