"""The table of what each structure keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.structures.experiment import AT_ONCE, GRIDS, NAIVE
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results

SETTING = """{tasks} tasks of permuted digits with batches of {batch}, Adam; Fisher of one sample, `Accumulate()`. \
Mean ± standard deviation over n seeds of the accuracy on all tasks after the last, of the accuracy on each just after \
it, and of the drop in between. λ was chosen on seed 1000, on images held out of training."""


def report(results: Results, out: Path) -> str:
    """Markdown: a table for each model."""
    lines = ["# What each structure keeps of permuted digits"]
    if results.tuning:
        return "\n\n".join([*lines, "The strengths that are tried, on images held out.", _accuracies(results)[0]])
    lines.append(SETTING.format_map(results.first))
    for model, part in results.by("model"):
        size = part.finals("parameters", part.labels[0])
        count = f"{next(iter(size.values())):,.0f} parameters; " if size else ""
        lines += [f"## {model}", "{}{steps} steps a task at {rate}.".format(count, **part.first), *_accuracies(part)]
    return "\n\n".join(line for line in lines if line)


def _accuracies(results: Results) -> tuple[str, str]:
    """The table, and the rows whose strength is an end of what was tried."""
    titles, sizes = ("forgetting", "when learned", "MiB", "λ", "n"), {}
    for row in results.select("bytes"):  # foreseen, also of what is too large to be tried
        sizes[row["row"]] = row["value"] / 2**20
    columns = [Column("kept"), Column("accuracy", 3, max), *map(Column, titles)]
    rows: list[list[Cell]] = []
    ends = []
    for one in results.each():
        accuracy, forgetting, learned = (one.final(name) for name in ("average_accuracy", "forgetting", "learned"))
        plain, strength = one.first["method"] in (NAIVE, AT_ONCE), one.first["strength"]
        name = one.label if results.tuning else one.first["method"]
        if not plain and strength in (GRIDS[one.first["method"]][0], GRIDS[one.first["method"]][-1]):
            ends.append(name)
        rows.append([
            name, accuracy, None if one.first["method"] == AT_ONCE else forgetting, learned,
            f"{sizes[name]:.3g}" if name in sizes else "", "" if plain else f"{strength:g}",
            accuracy.n if accuracy else 0,
        ])  # fmt: skip
    return table(columns, rows), f"λ at an end of what was tried: {'; '.join(ends)}." if ends else ""
