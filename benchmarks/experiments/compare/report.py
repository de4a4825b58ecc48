"""The tables and the figures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.compare.setting import EXPERIENCES, FIRST_SEED, STREAM
from benchmarks.harness.matrices import accuracy_matrix, plot_matrices
from benchmarks.harness.plots import Curves, Dots, plot_curves, plot_dots
from benchmarks.harness.scatter import Points, plot_scatter
from benchmarks.harness.significance import compared, holm
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.strategies import STRATEGIES

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

FISHER = "CurvatureEWC Fisher, accumulate"
ACCURACY = "average_accuracy"
FEW = 5
SHOWN = (
    "Naive", "Cumulative", "Replay", "DER++", "GEM", "EWC", "SI fixed", "LwF", "CurvatureEWC Fisher, accumulate",
    "CurvatureEWC Fisher, merge", "CurvatureEWC Fisher, Kronecker, adaptive", "GPM",
)  # in figures that have no room for all


def report(results: Results, out: Path) -> str:
    """Markdown, with figures in `out`."""
    config = next((results.config(label) for label in results.labels if results.config(label)), {})
    setting = config.get("setting", {})
    every = setting.get("every")
    lines = [
        f"# Comparison on {setting.get('stream', '?')}, {setting.get('scenario', '?')}-incremental",
        f"{setting.get('experiences')} experiences of {setting.get('steps')} steps with batches of "
        f"{setting.get('batch')}, Adam at {setting.get('rate')}; methods with a memory store "
        f"{setting.get('memory'):.3g} of the training examples. Mean ± standard deviation over n seeds. Accuracy is "
        "the mean over all experiences at the end, as the strategy itself evaluates; forgetting the mean drop since "
        "each was learned. "
        f"{_on_strengths(results)}",
        "## Accuracy",
        _accuracies(results),
        _not_run(setting.get("scenario", "")),
        "## Fidelity and cost",
        "κ is the mean absolute error of the quadratic model on stored examples, averaged over the trajectory, with "
        f"a measurement every {every} steps: for each experience kept at its own anchor (accumulate) or moved to the "
        "newest (refresh). CurvatureEWC keeps the diagonal where a row does not say otherwise. Training time is "
        "without metrics, whose time is beside it.",
        _prices(results),
        "## Figures",
        draw(results, out),
    ]
    return "\n\n".join(line for line in lines if line)


def _accuracies(results: Results) -> str:
    baseline = results.manifest["options"]["baseline"]
    columns = [
        Column("strategy"), Column("accuracy", 3, max), Column("forgetting", 3), Column("when learned", 3),
        Column(f"less {baseline}", 3), Column("p (Holm)"), Column("verdict"), Column("λ"), Column("n"),
    ]
    rows: list[list[Cell]] = []
    tests = _tests(results, baseline)
    for label in results.labels:
        accuracy, forgetting, learned = (results.final(name, label) for name in (ACCURACY, "forgetting", "learned"))
        strength = results.config(label).get("method", {}).get("strength")
        written = "" if strength is None else f"{strength:g}"
        n = accuracy.n if accuracy else 0
        rows.append([label, accuracy, forgetting, learned, *tests.get(label, ("", "", "")), written, n])
    test = (
        f"*less {baseline}* is the difference seed by seed, p that of the two-sided paired t-test, after Holm's "
        "correction for the number of rows, none below three seeds; the verdict is at 5 %."
    )
    few = len({header["seed"] for header in results.headers}) < FEW
    look = " Fewer than five seeds are a first look, not a result." if few else ""
    return f"{table(columns, rows, footnotes=notes(results))}\n\n{test}{look}{_on_edges(results)}"


def _tests(results: Results, baseline: str) -> dict[str, list[Cell]]:
    """For each row but the baseline's: its difference from the baseline, p and the verdict."""
    values = {label: results.finals(ACCURACY, label) for label in results.labels}
    if not values.get(baseline):
        return {}
    found = {label: compared(values[baseline], own) for label, own in values.items() if own and label != baseline}
    tested = {label: test.p for label, test in found.items() if test.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values()))))
    return {
        label: [test.difference, _p(corrected.get(label)), test.verdict(corrected.get(label))]
        for label, test in found.items()
    }


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"


def _prices(results: Results) -> str:
    columns = [
        Column("strategy"), Column("κ accumulate", 3), Column("κ refresh", 3), Column("train s", 2),
        Column("metrics s", 2), Column("stored KiB", 0),
    ]
    rows: list[list[Cell]] = []
    for label in results.labels:
        kappas = [results.final(f"fidelity_trajectory/{p}/kappa_abs", label) for p in ("accumulate", "refresh")]
        seconds, measuring, stored = (
            results.final(name, label) for name in ("seconds", "metric_seconds", "stored_bytes")
        )
        rows.append([
            label, *kappas, seconds and seconds.mean, measuring and measuring.mean, stored and stored.mean / 1024
        ])
    return table(columns, rows)


def _on_strengths(results: Results) -> str:
    """Where the strengths come from, in words."""
    options = results.manifest["options"]
    if options["tune"]:
        first = options["first"] or EXPERIENCES
        part = "the whole stream" if options["tune"] == STREAM else f"its first {first} experiences"
        return (
            f"Strengths λ were chosen on {part}, by the accuracy on a tenth of the training examples that was held "
            f"out, on seed{_range(options['tuning_seeds'] or 1)}."
        )
    places = {str(place) for label in results.labels if (place := results.config(label).get("tuned_on"))}
    where = f" on {', '.join(sorted(places))}, by held-out examples and seeds from 1000 on" if places else " nowhere"
    return f"Strengths λ were tuned before{where}; `--tune` tunes them on the stream itself."


def _range(seeds: int) -> str:
    """Those of the tuning, after the word seed."""
    first, last = FIRST_SEED, FIRST_SEED + seeds - 1
    return f" {first}" if seeds == 1 else f"s {first} to {last}"


def _on_edges(results: Results) -> str:
    """The methods whose strength, chosen by tuning, is the least or the largest that was tried."""
    edges = []
    for label in results.labels:
        config, grid = results.config(label), STRATEGIES[label].grid if label in STRATEGIES else ()
        if config.get("tuned_on") and grid and config["method"]["strength"] in (min(grid), max(grid)):
            edges.append(label)
    return f" λ at an end of what was tried, so perhaps better beyond it: {'; '.join(edges)}." if edges else ""


def _not_run(scenario: str) -> str:
    """The strategies that cannot be in the table, and why."""
    reasons = {name: entry.unfit[scenario] for name, entry in STRATEGIES.items() if scenario in entry.unfit}
    lines = [f"- {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join(["Not in the table:", "", *lines]) if lines else ""


def notes(results: Results) -> dict[str, str]:
    """Known upstream faults, and rows that are equal to another for whatever reason."""
    weights = {
        label: {row["seed"]: row["value"] for row in results.select("weights", label)} for label in results.labels
    }
    naive, fisher = weights.get("Naive", {}), weights.get(FISHER)
    notes = {}
    for label, own in weights.items():
        said = [STRATEGIES[label].fault] if label in STRATEGIES and STRATEGIES[label].fault else []
        shared = own.keys() & naive.keys()
        if label != "Naive" and shared and all(own[seed] == naive[seed] for seed in shared):
            said.append("Ends with exactly the weights of Naive in every seed: it had no effect here.")
        elif own and label != FISHER and own == fisher:
            said.append(
                "Ends with the weights of the Fisher in every seed: on a ReLU network with cross-entropy the diagonals "
                "of Hessian, GGN and Fisher are equal, so one policy stands for all."
            )
        if said:
            notes[label] = " ".join(said)
    return notes


def draw(results: Results, out: Path) -> str:
    """Write the figures and return the Markdown that shows them."""
    _curves(results, out / "compare.png")
    _dots(results, out / "final.png")
    _scatter(results, out / "fidelity.png")
    figures = [
        "![Average accuracy of seen tasks and error of the quadratic model](compare.png)",
        "![Final accuracy, forgetting and cost](final.png)",
        "![Accuracy against the error of the quadratic model](fidelity.png)",
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
        Curves(kappa, "mean |κ|", "Error of the quadratic model kept at each experience's own anchor", log=True),
        Curves(fresh, "mean |κ|", "Error of the quadratic model moved to the newest anchor", log=True),
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
    for model, title in titles.items():
        metric = f"fidelity_trajectory/{model}/kappa_abs"
        shown = [label for label in SHOWN if label in results.labels]
        points = {label: (results.final(metric, label), results.final("average_accuracy", label)) for label in shown}
        panels.append(Points(points, "mean |κ| over the trajectory", "average accuracy", title, log_x=True))
    plot_scatter(path, panels, labels=results.labels)
