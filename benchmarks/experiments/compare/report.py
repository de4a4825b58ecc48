"""The tables and the figures of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.compare.setting import EXPERIENCES, STREAM
from benchmarks.harness.matrices import accuracy_matrix, plot_matrices
from benchmarks.harness.plots import Curves, Dots, Points, plot_curves, plot_dots, plot_scatter
from benchmarks.harness.significance import compared, corrected
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.harness.terminal import Glance
from benchmarks.harness.tuning import FIRST_SEED
from benchmarks.strategies import MAIN, MATTER, SHOWN, STRATEGIES

if TYPE_CHECKING:
    from benchmarks.harness import Results

NAIVE = "Naive"
FISHER = "CurvatureEWC Fisher, accumulate"
ACCURACY = "average_accuracy"
FEW = 5

GLANCE = Glance(
    rows=MAIN,
    columns={
        "accuracy": "over all experiences at the end, mean ± standard deviation over seeds",
        "less ": "", "verdict": "of a paired t-test over seeds, after Holm's correction, at 5 %",
        "forgetting": "", "p (Holm)": "", "λ": "", "n": "",
    },
)  # fmt: skip
SETTING = """{experiences} experiences of {steps} steps with batches of {batch}, Adam at {rate}; methods with a memory \
store {memory:.3g} of the training examples. Mean ± standard deviation over n seeds. Accuracy is the mean over all \
experiences at the end, as the strategy itself evaluates; forgetting the mean drop since each was learned."""
FIDELITY = """κ is the mean absolute error of the quadratic model on stored examples, averaged over the trajectory, \
with a measurement every {fidelity_every} steps: for each experience kept at its own anchor (accumulate) or moved to \
the newest (refresh). CurvatureEWC keeps the diagonal where a row does not say otherwise. Training time is without \
metrics, whose time is beside it."""


def report(results: Results, out: Path) -> str:
    """Markdown, with figures in `out`."""
    setting = results.first
    lines = [
        f"# Comparison on {setting['stream']}, {setting['scenario']}-incremental",
        f"{SETTING.format_map(setting)} {_on_strengths(results)}",
        "## Accuracy",
        _accuracies(results),
        _not_run(setting["scenario"]),
        "## Fidelity and cost",
        FIDELITY.format_map(setting),
        _prices(results),
        "## Figures",
        draw(results, out),
    ]
    return "\n\n".join(line for line in lines if line)


def _accuracies(results: Results) -> str:
    baseline = results.manifest["options"]["baseline"]
    tests = _tests(results, baseline)
    tested = any(p is not None for _, p, _ in tests.values())
    columns = [
        Column("strategy"), Column("accuracy", 3, max), Column("forgetting", 3), Column("when learned", 3),
        Column(f"less {baseline}", 3), *([Column("p (Holm)"), Column("verdict")] if tested else []), Column("λ"),
        Column("n"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for one in results.each():
        test = tests.get(one.first["strategy"], ("", "", ""))
        accuracy, forgetting, learned = (one.final(name) for name in (ACCURACY, "forgetting", "learned"))
        strength = one.first.get("strength")  # no column where no row has one
        rows.append([
            one.label, accuracy, forgetting, learned, *(test if tested else test[:1]),
            "" if strength is None else f"{strength:g}", accuracy.n if accuracy else 0,
        ])  # fmt: skip
    meaning = f"*less {baseline}* is the difference seed by seed" + (
        ", p that of the two-sided paired t-test, after Holm's correction for the number of rows, none below three "
        "seeds; the verdict is at 5 %."
        if tested
        else "; it is not tested below three seeds."
    )
    few = len({header["seed"] for header in results.headers}) < FEW
    look = " Fewer than five seeds are a first look, not a result." if few else ""
    return f"{table(columns, rows, footnotes=notes(results))}\n\n{meaning}{look}{_on_edges(results)}"


def _tests(results: Results, baseline: str) -> dict[str, tuple[Cell, str | None, str]]:
    """For each strategy but the baseline: its difference from the baseline, p and the verdict."""
    values = {one.first["strategy"]: one.finals(ACCURACY) for one in results.each()}
    least = values.pop(baseline, None)
    if not least:
        return {}
    found = {name: compared(least, own) for name, own in values.items() if own}
    return {
        name: (found[name].difference, None if p is None else f"{p:.2g}", found[name].verdict(p))
        for name, p in corrected(found).items()
    }


def _prices(results: Results) -> str:
    columns = [
        Column("strategy"), Column("κ accumulate", 3), Column("κ refresh", 3), Column("train s", 2),
        Column("metrics s", 2), Column("stored KiB", 0),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for one in results.each():
        kappas = [one.final(f"fidelity_trajectory/{model}/kappa_abs") for model in ("accumulate", "refresh")]
        seconds, measuring, stored = (one.final(name) for name in ("seconds", "metric_seconds", "stored_bytes"))
        rows.append([
            one.label, *kappas, seconds and seconds.mean, measuring and measuring.mean, stored and stored.mean / 1024
        ])  # fmt: skip
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
    places = {place for place, _ in results.by("tuned_on") if place}
    where = f" on {', '.join(sorted(places))}, by held-out examples and seeds from 1000 on" if places else " nowhere"
    return f"Strengths λ were tuned before{where}; `--tune` tunes them on the stream itself."


def _range(seeds: int) -> str:
    """Those of the tuning, after the word seed."""
    first, last = FIRST_SEED, FIRST_SEED + seeds - 1
    return f" {first}" if seeds == 1 else f"s {first} to {last}"


def _on_edges(results: Results) -> str:
    """The methods whose strength, chosen by tuning, is the least or the largest that was tried."""
    edges = []
    for one in results.where(tuned_on=bool).each():
        grid = STRATEGIES[one.first["strategy"]].grid
        if one.first["strength"] in (min(grid), max(grid)):
            edges.append(one.label)
    return f" λ at an end of what was tried, so perhaps better beyond it: {'; '.join(edges)}." if edges else ""


def _not_run(scenario: str) -> str:
    """The strategies that cannot be in the table, and why."""
    reasons = {name: entry.unfit[scenario] for name, entry in STRATEGIES.items() if scenario in entry.unfit}
    lines = [f"- {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join(["Not in the table:", "", *lines]) if lines else ""


def notes(results: Results) -> dict[str, str]:
    """Known upstream faults, and rows that are equal to another for whatever reason."""
    weights = {one.first["strategy"]: one.finals("weights") for one in results.each()}
    naive, fisher = weights.get(NAIVE, {}), weights.get(FISHER)
    notes = {}
    for one in results.each():
        name = one.first["strategy"]
        own, said = weights[name], [STRATEGIES[name].fault] if STRATEGIES[name].fault else []
        shared = own.keys() & naive.keys()
        if name != NAIVE and shared and all(own[seed] == naive[seed] for seed in shared):
            said.append("Ends with exactly the weights of Naive in every seed: it had no effect here.")
        elif own and name != FISHER and own == fisher:
            said.append(
                "Ends with the weights of the Fisher in every seed: on a ReLU network with cross-entropy the diagonals "
                "of Hessian, GGN and Fisher are equal, so one policy stands for all."
            )
        if said:
            notes[one.label] = " ".join(said)
    return notes


def draw(results: Results, out: Path) -> str:
    """Write the figures and return the Markdown that shows them."""
    shown = list(results.where(strategy=lambda name: name in SHOWN).each())
    shown.sort(key=lambda one: SHOWN.index(one.first["strategy"]))
    _curves(shown, out / "compare.png", results.labels)
    _dots(results, out / "final.png")
    _scatter(shown, out / "fidelity.png", results.labels)
    figures = [
        "![Average accuracy of seen tasks and error of the quadratic model](compare.png)",
        "![Final accuracy, forgetting and cost](final.png)",
        "![Accuracy against the error of the quadratic model](fidelity.png)",
    ]
    sequential = {one.label: matrix for one in shown if (matrix := accuracy_matrix(one, one.label))}
    if sequential:
        plot_matrices(out / "matrices.png", sequential)
        figures.insert(2, "![Accuracy on experience j after experience t](matrices.png)")
    return "\n\n".join(figures)


def _curves(shown: Sequence[Results], path: Path, labels: Sequence[str]) -> None:
    accuracy, kappa, fresh = (
        {one.label: one.curve(metric) for one in shown}
        for metric in ("accuracy/seen", "fidelity/accumulate/kappa_abs", "fidelity/refresh/kappa_abs")
    )
    panels = [
        Curves(accuracy, "accuracy on seen tasks", "Accuracy after each experience"),
        Curves(kappa, "mean |κ|", "Error of the quadratic model kept at each experience's own anchor", log=True),
        Curves(fresh, "mean |κ|", "Error of the quadratic model moved to the newest anchor", log=True),
    ]
    plot_curves(path, panels, xlabel="training iteration", labels=labels, matter=MATTER)


def _dots(results: Results, path: Path) -> None:
    panels = {ACCURACY: "average accuracy", "forgetting": "forgetting", "seconds": "training time, s"}
    dots = [
        Dots({one.label: one.final(name) for one in results.each()}, text, log=name == "seconds")
        for name, text in panels.items()
    ]
    plot_dots(path, dots, labels=results.labels, matter=MATTER)


def _scatter(shown: Sequence[Results], path: Path, labels: Sequence[str]) -> None:
    titles = {"accumulate": "Kept at each anchor", "refresh": "Moved to the newest"}
    panels = []
    for model, title in titles.items():
        metric = f"fidelity_trajectory/{model}/kappa_abs"
        points = {one.label: (one.final(metric), one.final(ACCURACY)) for one in shown}
        panels.append(Points(points, "mean |κ| over the trajectory", "average accuracy", title, log_x=True))
    plot_scatter(path, panels, labels=labels, matter=MATTER)
