"""The tables and the figures of the two assumptions: errors along training, and the ratio of a Hessian's diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from benchmarks.experiments.taylor.ratio import Inputs, expected_ratio, explained, fitted
from benchmarks.harness import Summary, summarise
from benchmarks.harness.plots import MUTED, legend, new_figure, saved, styles, tidy
from benchmarks.harness.tables import Column, in_powers, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLE = '# A diagonal for the Hessian, a quadratic for the loss: section 3 of "An Optimization View of EWC"'
RATIO_HEAD = """\
## Assumption 2: how much of a Hessian is on its diagonal

Linear regression on M random examples of D features: H = (2/M) XᵀX, r = Σ_i |H_ii| / Σ_ij |H_ij|. The note (section
3.2) says r ∝ log(M/D). For standard normal inputs E|H_ii| = 2 and E|H_ij| ≈ 2√(2/(πM)), hence
r ≈ 1 / (1 + (D − 1) √(2/(πM))): for large D a function of M/D², not of M/D, with nothing logarithmic in it. The note
gives its Figure 1 without numbers, inputs or sizes."""
PATH_HEAD = """\
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
Ratios: TypeAlias = Mapping[tuple[int, int], Summary]
"""The ratio over seeds by (M, D)."""
Measured: TypeAlias = "Sequence[tuple[Results, Inputs]]"
"""The results of each kind of inputs."""


def report(results: Results, out: Path) -> str:
    """Markdown, with figures in `out`, of the two assumptions where they were measured."""
    parts = dict(results.by("assumption"))
    return "\n\n".join([TITLE, *(_ratios(parts[2], out) if 2 in parts else []),
                        *(_paths(parts[1], out) if 1 in parts else [])])


def _ratios(results: Results, out: Path) -> list[str]:
    """Figure 1 of the note again: the ratio against the note's law and against the closed form."""
    measured = [(one, Inputs(one.first["mean"], one.first["correlation"])) for one in results.each()]
    blocks = [RATIO_HEAD, _laws(measured), _limits(measured)]
    for one, own in measured:
        if own == Inputs():  # standard normal
            points = _by_size(one)
            blocks += [_grid(one.label, points), "![The ratio against M/D and against M/D²](ratio.png)"]
            _ratio_figure(points, out / "ratio.png")
    return blocks


def _by_size(results: Results) -> Ratios:
    values: dict[tuple[int, int], list[float]] = {}
    for row in results.select("ratio"):
        values.setdefault((row["examples"], row["dimension"]), []).append(row["value"])
    return {size: summarise(found) for size, found in values.items()}


def agreement(rows: Sequence[Mapping[str, Any]], inputs: Inputs) -> dict[str, float]:
    """R² over all measured (M, D) and seeds: of b log(M/D), of a + b log(M/D), each with its best coefficients, of the
    latter with coefficients of its own for each D, and of the closed form, which has none."""
    values, counts, sizes = (np.array([row[key] for row in rows], float) for key in ("value", "examples", "dimension"))
    log, one = np.log(counts / sizes), np.ones_like(values)
    closed = np.array([expected_ratio(inputs, m, int(d)) for m, d in zip(counts, sizes)])
    each = np.zeros_like(values)
    for size in set(sizes):
        here = sizes == size
        each[here] = fitted(values[here], one[here], log[here])
    found = {
        "b log(M/D)": fitted(values, log), "a + b log(M/D)": fitted(values, one, log), "a_D + b_D log(M/D)": each,
        "closed form": closed,
    }
    return {name: explained(values, prediction) for name, prediction in found.items()}


def _laws(measured: Measured) -> str:
    rows: list[list] = []
    for one, own in measured:
        found = one.select("ratio")
        rows.append([one.label, *agreement(found, own).values(), len({row["seed"] for row in found})])
    columns = [
        Column("inputs"), Column("b log(M/D)"), Column("a + b log(M/D)"), Column("a_D + b_D log(M/D)"),
        Column("closed form", 4), Column("seeds"),
    ]
    return (
        "R² of each law over all sizes and seeds. The logarithmic ones have their best coefficients, the third a pair "
        "for each D; the closed form has none. Negative: worse than the mean of all ratios.\n\n" + table(columns, rows)
    )


def _limits(measured: Measured) -> str:
    """The ratio at the most examples of each dimension, and where it goes."""
    rows: list[list] = []
    for one, inputs in measured:
        points = _by_size(one)
        for size in sorted({d for _, d in points}):
            most = max(m for m, d in points if d == size)
            closed = (expected_ratio(inputs, m, size) for m in (most, math.inf))
            rows.append([one.label, size, most, points[most, size], *closed])
    columns = [
        Column("inputs"), Column("D"), Column("M"), Column("r measured"), Column("closed form"),
        Column("closed form, M → ∞"),
    ]
    return (
        "More data help only inputs that are centred and uncorrelated. With features of variance 1, mean m and "
        "correlation ρ, r → (1 + m²) / (1 + m² + (D − 1) |ρ + m²|) as M → ∞, about 1/D for non-centred inputs "
        "(uniform ones on [0, 1] are as m = √3: 4 / (3 D + 1)).\n\n" + table(columns, rows)
    )


def _grid(label: str, points: Ratios) -> str:
    factors = sorted({m / d for m, d in points})
    rows: list[list] = []
    for size in sorted({d for _, d in points}):
        found = [points.get((round(size * factor), size)) for factor in factors]
        rows.append([f"D = {size}", *found])
        known = [expected_ratio(Inputs(), size * f, size) if s else None for f, s in zip(factors, found)]
        rows.append(["closed form", *known])
    columns = [Column(label), *(Column(f"M/D = {factor:g}") for factor in factors)]
    return "Were r a function of M/D, each column would hold one number:\n\n" + table(columns, rows)


def _ratio_figure(points: Ratios, path: Path) -> None:
    """The measured ratios against M/D and against M/D², with the closed form as lines."""
    by_size = {d: sorted(m for m, size in points if size == d) for d in sorted({d for _, d in points})}
    chosen = styles([f"D = {d}" for d in by_size])
    figure = new_figure(10.4, 4.0)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, power in zip(panels, (1, 2)):
        for style, (d, counts) in zip(chosen.values(), by_size.items()):
            own = [points[m, d] for m in counts]
            axes.errorbar(
                [m / d**power for m in counts], [s.mean for s in own], [s.std or 0.0 for s in own], color=style.colour,
                marker=style.marker, linestyle="", markersize=5,
            )
            if power == 1:
                line = np.geomspace(counts[0], counts[-1], 60)
                axes.plot(line / d, [expected_ratio(Inputs(), m, d) for m in line], color=style.colour, linewidth=1.2,
                          zorder=1)
        axes.set_xscale("log")
    every = [m / d**2 for m, d in points]
    line = np.geomspace(min(every), max(every), 60)
    panels[1].plot(line, 1 / (1 + np.sqrt(2 / (math.pi * line))), color=MUTED, linewidth=1.2, zorder=1)
    panels[0].set(xlabel="M / D", ylabel="Σ|H_ii| / Σ|H_ij|")
    panels[1].set(xlabel="M / D²")
    tidy(panels[0], "Against M/D: a curve for each D")
    tidy(panels[1], "Against M/D²: one curve, 1 / (1 + √(2D²/πM))")
    legend(figure, chosen, linestyle="")
    saved(figure, path)


def _paths(results: Results, out: Path) -> list[str]:
    """Which approximation is worse how far from the anchor."""
    paths = list(results.each())
    _error_figure(paths, out / "errors.png")
    return [PATH_HEAD, *(part(paths) for part in (_setting, _crossovers, _counts, _places)),
            "![Errors against the distance from the anchor](errors.png)"]


def _setting(paths: Sequence[Results]) -> str:
    lines = ["Double precision. Task B: another linear function (regression) or permutation of the pixels (images).\n"]
    for one in paths:
        row = one.first
        if row["strength"]:
            lines.append(f"- {one.label}: with EWC's penalty (diagonal Fisher) at λ = {row['strength']:g} on B.")
        else:
            problem = one.config(one.label)["problem"].items()
            details = ", ".join(f"{key} {value}" for key, value in problem if key != "class")
            lines.append(f"- {one.label}: {details}; then {row['steps']} steps of SGD on B at {row['rate']:g}.")
    return "\n".join(lines)


def _crossovers(paths: Sequence[Results]) -> str:
    """How far out the diagonal error is the larger one."""
    rows: list[list] = []
    for one in paths:
        dominated, crossed, increase, loss, gradient = map(
            one.final, ("dominated", "crossover", "crossover_increase", "anchor_loss", "anchor_gradient")
        )
        count = f"{crossed.n if crossed else 0} of {len(one.finals('distance'))}"
        rows.append([one.label, dominated, count, crossed, increase, loss, gradient])
    columns = [
        Column("training on B", 2), Column("diagonal error larger", 2), Column("Taylor overtakes"),
        Column("at distance", 2), Column("with increase", 2), Column("L(a)"), Column("‖g‖ at a", 2),
    ]  # fmt: skip
    return (
        "Share of measured steps (1, 2, 3, 5, …, each half larger) at which the diagonal error is larger; seeds in "
        "which the Taylor error exceeds it at any of them, the first such distance, and the increase of L there:\n\n"
        + table(columns, rows)
    )


def _counts(paths: Sequence[Results]) -> str:
    """In how many runs on networks the Taylor error is the larger one somewhere."""
    lines = []
    for name, penalised in (("plain training", False), ("training with EWC's penalty", True)):
        some = [one for one in paths if _is_network(one) and bool(one.first["strength"]) == penalised]
        runs, crossed = (sum(len(one.finals(metric)) for one in some) for metric in ("distance", "crossover"))
        if runs:
            last = sum(map(ends_beyond, some))
            lines.append(f"in {crossed} of {runs} runs of {name} (in {last} at their last step)")
    if not lines:
        return "No network was measured."
    return f"On networks the Taylor error exceeds the diagonal error somewhere {' and '.join(lines)}."


def ends_beyond(results: Results) -> int:
    """In how many runs of a path the Taylor error is the larger one at the last step."""
    diagonal = results.finals("diagonal")
    return sum(value > diagonal[seed] for seed, value in results.finals("taylor").items())


def _is_network(results: Results) -> bool:
    return results.first["problem"] != "LinearRegression"


def _places(paths: Sequence[Results]) -> str:
    rows: list[list] = []
    for one in paths:
        steps = [int(step) for step, _ in one.curve("distance")]
        for step in dict.fromkeys(steps[place] for place in (0, len(steps) // 3, 2 * len(steps) // 3, -1)):
            found = [in_powers(one.final(name, step=step)) for name in COLUMNS]
            rows.append([f"{one.label}, step {step}", one.final("distance", step=step), *found])
    columns = [Column("training on B"), Column("distance", 2), *map(Column, COLUMNS.values())]
    return (
        "Mean ± standard deviation over seeds. \"Predicted by diag(H)\" is ½ δᵀ diag(H) δ, which EWC holds against the "
        "increase; \"GGN for H\" is ½ |δᵀ (H − GGN) δ|:\n\n" + table(columns, rows)
    )


def _error_figure(paths: Sequence[Results], path: Path) -> None:
    """A panel for each path, networks first: errors against distance, and a line at the first crossover."""
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = math.ceil(len(paths) / 2)
    figure = new_figure(11.0, 0.5 + 2.9 * rows)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    chosen = styles([*SERIES.values()])
    for axes, one in zip(grid, sorted(paths, key=lambda one: not _is_network(one))):
        if crossed := one.final("crossover"):
            axes.axvline(crossed.mean, color=MUTED, linewidth=1.0, linestyle="--", zorder=0)
        distances = dict(one.curve("distance"))
        for name, title in SERIES.items():
            points = [(distances[step].mean, value.mean) for step, value in one.curve(name)]
            if shown := [(x, y) for x, y in points if y > 0]:
                axes.plot(*zip(*shown), linewidth=1.6, **chosen[title].line)
        axes.set(xscale="log", yscale="log", xlabel="distance ‖θ − a‖")
        tidy(axes, one.label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in grid[len(paths) :]:
        axes.set_visible(False)
    legend(figure, chosen)
    saved(figure, path)
