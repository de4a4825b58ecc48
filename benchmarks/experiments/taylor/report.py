"""The report of the `taylor` experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.taylor import ratio_report
from benchmarks.experiments.taylor.plots import Errors, plot_errors
from benchmarks.harness.summary import Summary
from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLE = '# A diagonal for the Hessian, a quadratic for the loss: section 3 of "An Optimization View of EWC"'
HEAD = """\
## Assumption 1: the error of the expansion beside that of the diagonal

A model is trained on task A, then on task B from there (the anchor a). With δ = θ − a, and L the mean loss on A, its
increase splits as gᵀδ + ½ δᵀ diag(H) δ + ½ δᵀ (H − diag H) δ + rest. The last two are what the note compares: the
diagonal error (Assumption 2) and the Taylor error (Assumption 1), in absolute value. The note (section 3.1) finds for
linear regression that the diagonal error dominates "no matter how data changes". There it must: a quadratic loss *is*
its expansion, and its Taylor error is rounding. For a smooth network the Taylor error grows with the cube of a small
distance and the diagonal error with its square, so that the latter dominates near the anchor, and how far is a question
of measurement. The gradient term is there because training stops before the minimum that the note's (5) assumes. The
note gives no numbers."""
SERIES = {
    "taylor": "Taylor error", "diagonal": "diagonal error", "slope": "gradient term |gᵀδ|", "ggn": "GGN for H",
    "increase": "increase of L",
}
COLUMNS = {
    "increase": "increase", "predicted": "predicted by diag(H)", "taylor": "Taylor error", "diagonal": "diagonal error",
    "slope": "gradient term", "ggn": "GGN for H",
}


def report(results: Results, out: Path) -> str:
    """Markdown, with figures in `out`."""
    paths = [label for label in results.labels if results.select("distance", label)]
    blocks = [TITLE, *ratio_report.report(results, out)]
    if paths:
        _figure(results, paths, out)
        blocks += [
            HEAD, _setting(results, paths), _crossovers(results, paths), _summary(results, paths),
            _places(results, paths),
            "![Errors against the distance from the anchor](errors.png)",
        ]
    return "\n\n".join(blocks)


def _setting(results: Results, paths: Sequence[str]) -> str:
    lines = ["Double precision. Task B: another linear function (regression) or permutation of the pixels (images).\n"]
    for label in paths:
        config = results.config(label)
        if _is_held(results, label):
            lines.append(f"- {label}: the same with EWC's penalty (diagonal Fisher) at λ = {config['strength']:g}.")
        else:
            problem = ", ".join(f"{key} {value}" for key, value in config["problem"].items() if key != "class")
            lines.append(f"- {label}: {problem}; then {config['steps']} steps of SGD on B at {config['rate']:g}.")
    return "\n".join(lines)


def _crossovers(results: Results, paths: Sequence[str]) -> str:
    """How far out the diagonal error is the larger one."""
    rows: list[list] = []
    for label in paths:
        seeds = {row["seed"] for row in results.select("distance", label)}
        crossed = results.final("crossover", label)
        rows.append([
            label, results.final("dominated", label), f"{crossed.n if crossed else 0} of {len(seeds)}", crossed,
            results.final("crossover_increase", label), results.final("anchor_loss", label),
            results.final("anchor_gradient", label),
        ])
    columns = [
        Column("training on B", 2), Column("diagonal error larger", 2), Column("Taylor overtakes"),
        Column("at distance", 2), Column("with increase", 2), Column("L(a)"), Column("‖g‖ at a", 2),
    ]
    return (
        "Share of measured steps (1, 2, 3, 5, …, each half larger) at which the diagonal error is larger; seeds in "
        "which the Taylor error exceeds it at any of them, the first such distance, and the increase of L there:\n\n"
        + table(columns, rows)
    )


def _summary(results: Results, paths: Sequence[str]) -> str:
    """What the numbers say of "always"."""
    lines = []
    for name, held in (("plain training", False), ("training with EWC's penalty", True)):
        some = [label for label in paths if _is_network(results, label) and _is_held(results, label) == held]
        runs = {(row["label"], row["seed"]) for label in some for row in results.select("distance", label)}
        crossed = {(row["label"], row["seed"]) for label in some for row in results.select("crossover", label)}
        if runs:
            last = sum(ends_beyond(results, *run) for run in runs)
            lines.append(f"in {len(crossed)} of {len(runs)} runs of {name} (in {last} at their last step)")
    if not lines:
        return "No network was measured."
    return f"On networks the Taylor error exceeds the diagonal error somewhere {' and '.join(lines)}."


def ends_beyond(results: Results, label: str, seed: int) -> bool:
    """Whether the Taylor error is the larger one at the last step of a run."""
    last = {name: results.select(name, label, seed=seed)[-1]["value"] for name in ("taylor", "diagonal")}
    return last["taylor"] > last["diagonal"]


def _is_network(results: Results, label: str) -> bool:
    return results.config(label)["problem"]["class"] != "LinearRegression"


def _is_held(results: Results, label: str) -> bool:
    return bool(results.config(label)["strength"])


def _places(results: Results, paths: Sequence[str]) -> str:
    rows: list[list] = []
    for label in paths:
        steps = [int(step) for step, _ in results.curve("distance", label)]
        for step in dict.fromkeys(steps[place] for place in (0, len(steps) // 3, 2 * len(steps) // 3, -1)):
            found = [short(results.final(name, label, step=step)) for name in COLUMNS]
            rows.append([f"{label}, step {step}", results.final("distance", label, step=step), *found])
    columns = [Column("training on B"), Column("distance", 2), *map(Column, COLUMNS.values())]
    return (
        "Mean ± standard deviation over seeds. \"Predicted by diag(H)\" is ½ δᵀ diag(H) δ, which EWC holds against the "
        "increase; \"GGN for H\" is ½ |δᵀ (H − GGN) δ|:\n\n" + table(columns, rows)
    )


def short(summary: Summary | None) -> str | None:
    """Two digits, for numbers of any size.

    >>> short(Summary(0.00123, 0.0004, 5)), short(Summary(12.0, None, 1))
    ('1.2e-03 ± 4e-04', '1.2e+01')
    """
    if summary is None:
        return None
    return f"{summary.mean:.1e}" + ("" if summary.std is None else f" ± {summary.std:.0e}")


def _figure(results: Results, paths: Sequence[str], out: Path) -> None:
    panels = []
    for label in sorted(paths, key=lambda label: not _is_network(results, label)):
        distances = dict(results.curve("distance", label))
        series: Mapping[str, list[tuple[float, float]]] = {
            title: [(distances[step].mean, summary.mean) for step, summary in results.curve(name, label)]
            for name, title in SERIES.items()
        }
        crossed = results.final("crossover", label)
        panels.append(Errors(series, label, crossed.mean if crossed else None))
    plot_errors(out / "errors.png", panels)
