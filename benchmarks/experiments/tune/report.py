"""The table of strengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results
    from benchmarks.harness.summary import Summary

FIRST_SEED = 1000


def report(results: Results) -> str:
    """The accuracy of each method that has run at each strength, and the best."""
    found: dict[str, dict[float, Summary | None]] = {}
    for label in results.labels:
        if config := results.config(label):
            found.setdefault(config["method"], {})[config["strength"]] = results.final("accuracy", label)
    strengths = sorted({strength for cells in found.values() for strength in cells})
    rows: list[list[Cell]] = []
    for method, cells in found.items():
        means = {s: cell.mean for s, cell in cells.items() if cell and cell.mean == cell.mean}
        best = f"{max(means, key=lambda s: means[s]):g}" if means else "–"
        rows.append([method, *(cells.get(s) for s in strengths), best])
    columns = [Column("method"), *(Column(f"λ = {s:g}") for s in strengths), Column("best λ")]
    return f"# Average accuracy by strength, seeds from {FIRST_SEED} on\n\n" + table(columns, rows)
