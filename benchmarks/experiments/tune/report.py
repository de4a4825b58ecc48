"""The table of strengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.tables import Cell, Column, table
from benchmarks.harness.tuning import FIRST_SEED

if TYPE_CHECKING:
    from benchmarks.harness.results import Results


def report(results: Results, out: Path) -> str:
    """The accuracy of each method that has run at each strength, and the best."""
    strengths = sorted(strength for strength, _ in results.by("strength"))
    rows: list[list[Cell]] = []
    for method, part in results.by("method"):
        cells = {one.first["strength"]: one.final("accuracy") for one in part.each()}
        means = {strength: cell.mean for strength, cell in cells.items() if cell and cell.mean == cell.mean}
        best = f"{max(means, key=lambda strength: means[strength]):g}" if means else None
        rows.append([method, *map(cells.get, strengths), best])
    columns = [Column("method"), *(Column(f"λ = {strength:g}") for strength in strengths), Column("best λ")]
    return f"# Average accuracy by strength, seeds from {FIRST_SEED} on\n\n" + table(columns, rows)
