"""Figure 1 of the note again: tables of the ratio against the note's law and against the closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.experiments.taylor import INPUTS
from benchmarks.experiments.taylor.plots import Scatter, plot_scatter
from benchmarks.experiments.taylor.ratio import Inputs, expected_ratio, explained, fitted
from benchmarks.harness.summary import Summary, summarise
from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

HEAD = """\
## Assumption 2: how much of a Hessian is on its diagonal

Linear regression on M random examples of D features: H = (2/M) XᵀX, r = Σ_i |H_ii| / Σ_ij |H_ij|. The note (section
3.2) says r ∝ log(M/D). For standard normal inputs E|H_ii| = 2 and E|H_ij| ≈ 2√(2/(πM)), hence
r ≈ 1 / (1 + (D − 1) √(2/(πM))): for large D a function of M/D², not of M/D, with nothing logarithmic in it. The note
gives its Figure 1 without numbers, inputs or sizes."""

PLAIN = "standard normal"


def report(results: Results, out: Path) -> list[str]:
    """Markdown blocks, with a figure in `out`; none where no ratio was measured."""
    measured = {label: grouped(results, label) for label in INPUTS if results.select("ratio", label)}
    if not measured:
        return []
    blocks = [HEAD, _laws(results, list(measured)), _limits(measured)]
    if PLAIN in measured:
        points = measured[PLAIN]
        blocks += [_grid(points), "![The ratio against M/D and against M/D²](ratio.png)"]
        _figure(points, out)
    return blocks


def grouped(results: Results, label: str) -> dict[tuple[int, int], Summary]:
    """(M, D) ↦ the ratio over seeds."""
    values: dict[tuple[int, int], list[float]] = {}
    for row in results.select("ratio", label):
        values.setdefault((row["examples"], row["dimension"]), []).append(row["value"])
    return {size: summarise(found) for size, found in values.items()}


def agreement(rows: Sequence[dict[str, Any]], inputs: Inputs) -> dict[str, float]:
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


def _laws(results: Results, labels: Sequence[str]) -> str:
    rows: list[list] = []
    for label in labels:
        own = results.select("ratio", label)
        rows.append([label, *agreement(own, INPUTS[label]).values(), len({row["seed"] for row in own})])
    columns = [
        Column("inputs"), Column("b log(M/D)"), Column("a + b log(M/D)"), Column("a_D + b_D log(M/D)"),
        Column("closed form", 4), Column("seeds"),
    ]
    return (
        "R² of each law over all sizes and seeds. The logarithmic ones have their best coefficients, the third a pair "
        "for each D; the closed form has none. Negative: worse than the mean of all ratios.\n\n" + table(columns, rows)
    )


def _limits(measured: dict[str, dict[tuple[int, int], Summary]]) -> str:
    """The ratio at the most examples of each dimension, and where it goes."""
    rows: list[list] = []
    for label, points in measured.items():
        for size in sorted({d for _, d in points}):
            most = max(m for m, d in points if d == size)
            closed = (expected_ratio(INPUTS[label], m, size) for m in (most, math.inf))
            rows.append([label, size, most, points[most, size], *closed])
    columns = [
        Column("inputs"), Column("D"), Column("M"), Column("r measured"), Column("closed form"),
        Column("closed form, M → ∞"),
    ]
    return (
        "More data help only inputs that are centred and uncorrelated. With features of variance 1, mean m and "
        "correlation ρ, r → (1 + m²) / (1 + m² + (D − 1) |ρ + m²|) as M → ∞, about 1/D for non-centred inputs "
        "(uniform ones on [0, 1] are as m = √3: 4 / (3 D + 1)).\n\n" + table(columns, rows)
    )


def _grid(points: dict[tuple[int, int], Summary]) -> str:
    factors = sorted({m / d for m, d in points})
    rows: list[list] = []
    for size in sorted({d for _, d in points}):
        found = [points.get((round(size * factor), size)) for factor in factors]
        rows.append([f"D = {size}", *found])
        known = [expected_ratio(INPUTS[PLAIN], size * f, size) if s else None for f, s in zip(factors, found)]
        rows.append(["closed form", *known])
    columns = [Column(PLAIN), *(Column(f"M/D = {factor:g}") for factor in factors)]
    return "Were r a function of M/D, each column would hold one number:\n\n" + table(columns, rows)


def _figure(points: dict[tuple[int, int], Summary], out: Path) -> None:
    inputs, sizes = INPUTS[PLAIN], sorted({d for _, d in points})
    by_size = {d: sorted(m for m, size in points if size == d) for d in sizes}

    def scaled(power: int) -> dict[str, list[tuple[float, Summary]]]:
        return {f"D = {d}": [(m / d**power, points[m, d]) for m in by_size[d]] for d in sizes}

    lines = {
        f"D = {d}": [(m / d, expected_ratio(inputs, m, d)) for m in np.geomspace(by_size[d][0], by_size[d][-1], 60)]
        for d in sizes
    }
    every = [m / d**2 for m, d in points]
    limit = {"": [(x, 1 / (1 + math.sqrt(2 / (math.pi * x)))) for x in np.geomspace(min(every), max(every), 60)]}
    panels = [
        Scatter(scaled(1), lines, "M / D", "Against M/D: a curve for each D"),
        Scatter(scaled(2), limit, "M / D²", "Against M/D²: one curve, 1 / (1 + √(2D²/πM))"),
    ]
    plot_scatter(out / "ratio.png", panels, ylabel="Σ|H_ii| / Σ|H_ij|", labels=[f"D = {d}" for d in sizes])
