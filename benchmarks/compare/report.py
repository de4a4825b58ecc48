"""The table and the figures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import Curves, Dots, plot_curves, plot_dots
from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

KNOWN_FAULTS = {
    "SI": "Its stored weights alias the live ones on a CPU (Avalanche 0.6), so its penalty is zero: equal to Naive.",
    "MAS": "Avalanche 0.6 computes its importance in train mode; without dropout or BatchNorm that changes nothing.",
}
FISHER = "CurvatureEWC Fisher, accumulate"
SHOWN = ("Naive", "Cumulative", "Replay", "EWC", "LwF", "MAS", "CurvatureEWC Fisher, accumulate",
         "CurvatureEWC Fisher, merge", "CurvatureEWC Fisher, refresh", "CurvatureEWC Fisher, Kronecker, adaptive")


def report(results: Results, out: Path) -> str:
    """Markdown, with figures in `out`."""
    setting: dict = next((results.config(label)["setting"] for label in results.labels if results.config(label)), {})
    lines = [
        f"# Comparison on {setting.get('stream', '?')}",
        f"{setting.get('experiences')} experiences of {setting.get('steps')} steps with batches of "
        f"{setting.get('batch')}, Adam at {setting.get('rate')}; mean ± standard deviation over n seeds. CurvatureEWC "
        "keeps the diagonal where a row does not say otherwise. κ is the mean absolute error of the quadratic picture "
        "on stored examples, averaged over the trajectory: for each experience kept at its own anchor (accumulate) or "
        "moved to the newest (refresh). Training time is without metrics, whose time is beside it.",
        _table(results),
        "![Average accuracy of seen tasks and error of the picture](compare.png)",
        "![Final accuracy and forgetting](final.png)",
    ]
    _figures(results, out)
    return "\n\n".join(lines)


def _table(results: Results) -> str:
    columns = [
        Column("strategy"), Column("accuracy", 3, max), Column("forgetting", 3), Column("κ accumulate", 3),
        Column("κ refresh", 3), Column("λ"), Column("train s", 2), Column("metrics s", 2), Column("stored KiB", 0),
        Column("n"),
    ]
    rows = [[label, *_cells(results, label)] for label in results.labels]
    return table(columns, rows, footnotes=_notes(results))


def _cells(results: Results, label: str) -> list:
    names = ("average_accuracy", "forgetting", "fidelity_trajectory/accumulate/kappa_abs",
             "fidelity_trajectory/refresh/kappa_abs")
    values = [results.final(name, label) for name in names]
    strength = results.config(label).get("method", {}).get("strength")
    prices = ("seconds", "metric_seconds", "stored_bytes")
    seconds, measuring, stored = (results.final(name, label) for name in prices)
    return [
        *values,
        "" if strength is None else f"{strength:g}",
        seconds and seconds.mean,
        measuring and measuring.mean,
        stored and stored.mean / 1024,
        values[0].n if values[0] else 0,
    ]


def _notes(results: Results) -> dict[str, str]:
    """Known upstream faults, each checked against the runs, and rows that are equal to Naive for whatever reason."""
    naive = {row["seed"]: row["value"] for row in results.select("weights", "Naive")}
    fisher = {row["seed"]: row["value"] for row in results.select("weights", FISHER)}
    notes = {}
    for label in results.labels:
        own = {row["seed"]: row["value"] for row in results.select("weights", label)}
        shared = own.keys() & naive.keys()
        equal = bool(shared) and all(own[seed] == naive[seed] for seed in shared)
        if label in KNOWN_FAULTS and (label != "SI" or equal):
            notes[label] = KNOWN_FAULTS[label]
        elif equal and label != "Naive":
            notes[label] = "Ends with exactly the weights of Naive in every seed: it had no effect here."
        elif own and label != FISHER and own == fisher:
            notes[label] = (
                "Ends with the weights of the Fisher in every seed: on a ReLU network with cross-entropy the diagonals "
                "of Hessian, GGN and Fisher are equal, so one policy stands for all."
            )
    return notes


def _figures(results: Results, out: Path) -> None:
    shown = [label for label in SHOWN if label in results.labels]
    accuracy = {label: results.curve("accuracy/seen", label) for label in shown}
    kappa = {label: results.curve("fidelity/accumulate/kappa_abs", label) for label in shown}
    fresh = {label: results.curve("fidelity/refresh/kappa_abs", label) for label in shown}
    panels = [
        Curves(accuracy, "accuracy on seen tasks", "Accuracy after each experience"),
        Curves(kappa, "mean |κ|", "Error of the picture kept at each experience's own anchor", log=True),
        Curves(fresh, "mean |κ|", "Error of the picture moved to the newest anchor", log=True),
    ]
    plot_curves(out / "compare.png", panels, xlabel="training iteration", labels=results.labels)
    dots = [
        Dots({label: results.final("average_accuracy", label) for label in results.labels}, "average accuracy"),
        Dots({label: results.final("forgetting", label) for label in results.labels}, "forgetting"),
    ]
    plot_dots(out / "final.png", dots, labels=results.labels)
