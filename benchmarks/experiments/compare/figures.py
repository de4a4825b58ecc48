"""The figures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.matrices import accuracy_matrix, plot_matrices
from benchmarks.harness.plots import Curves, Dots, plot_curves, plot_dots
from benchmarks.harness.scatter import Points, plot_scatter

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

SHOWN = (
    "Naive", "Cumulative", "Replay", "DER++", "GEM", "EWC", "SI fixed", "LwF", "CurvatureEWC Fisher, accumulate",
    "CurvatureEWC Fisher, merge", "CurvatureEWC Fisher, Kronecker, adaptive", "GPM",
)  # in figures that have no room for all


def draw(results: Results, out: Path) -> str:
    """Write the figures and return the Markdown that shows them."""
    _curves(results, out / "compare.png")
    _dots(results, out / "final.png")
    _scatter(results, out / "fidelity.png")
    figures = [
        "![Average accuracy of seen tasks and error of the picture](compare.png)",
        "![Final accuracy, forgetting and cost](final.png)",
        "![Accuracy against the error of the picture](fidelity.png)",
    ]
    matrices = {label: accuracy_matrix(results, label) for label in SHOWN if label in results.labels}
    sequential = {label: matrix for label, matrix in matrices.items() if matrix}
    if sequential:
        plot_matrices(out / "matrices.png", sequential)
        figures.insert(2, "![Accuracy on experience j after experience t](matrices.png)")
    return "\n\n".join(figures)


def _curves(results: Results, path: Path) -> None:
    shown = [label for label in SHOWN if label in results.labels]
    accuracy, kappa, fresh = (
        {label: results.curve(metric, label) for label in shown}
        for metric in ("accuracy/seen", "fidelity/accumulate/kappa_abs", "fidelity/refresh/kappa_abs")
    )
    panels = [
        Curves(accuracy, "accuracy on seen tasks", "Accuracy after each experience"),
        Curves(kappa, "mean |κ|", "Error of the picture kept at each experience's own anchor", log=True),
        Curves(fresh, "mean |κ|", "Error of the picture moved to the newest anchor", log=True),
    ]
    plot_curves(path, panels, xlabel="training iteration", labels=results.labels)


def _dots(results: Results, path: Path) -> None:
    panels = {"average_accuracy": "average accuracy", "forgetting": "forgetting", "seconds": "training time, s"}
    dots = [
        Dots({label: results.final(name, label) for label in results.labels}, text, log=name == "seconds")
        for name, text in panels.items()
    ]
    plot_dots(path, dots, labels=results.labels)


def _scatter(results: Results, path: Path) -> None:
    titles = {"accumulate": "Kept at each anchor", "refresh": "Moved to the newest"}
    panels = []
    for picture, title in titles.items():
        metric = f"fidelity_trajectory/{picture}/kappa_abs"
        shown = [label for label in SHOWN if label in results.labels]
        points = {label: (results.final(metric, label), results.final("average_accuracy", label)) for label in shown}
        panels.append(Points(points, "mean |κ| over the trajectory", "average accuracy", title, log_x=True))
    plot_scatter(path, panels, labels=results.labels)
