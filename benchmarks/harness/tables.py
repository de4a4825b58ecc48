"""Markdown tables that read well as plain text too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.harness.reading import CONTROL
from benchmarks.harness.results import Summary

Cell: TypeAlias = str | int | float | Summary | None
"""A summary is written "mean ± std", or its mean alone where n = 1; None, a value that is missing, as a dash."""

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Column:
    """A title, the decimals of its numbers, and whether the highest (`max`) or the lowest (`min`) is set in bold."""

    title: str
    decimals: int = 3
    best: Callable[[list[float]], float] | None = None


def table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], footnotes: Mapping[str, str] | None = None) -> str:
    """A Markdown table.

    The first column names the rows. `footnotes` gives notes by such a name; rows with the same note share its mark.

    >>> print(table([Column("strategy"), Column("accuracy", 2, max)], [["Naive", Summary(0.5, 0.1, 3)], ["EWC", 0.75]]))
    | strategy |    accuracy |
    | :------- | ----------: |
    | Naive    | 0.50 ± 0.10 |
    | EWC      |    **0.75** |
    """
    notes = footnotes or {}
    used = dict.fromkeys(notes[str(row[0])] for row in rows if str(row[0]) in notes)
    marks = {note: str(number).translate(SUPERSCRIPTS) for number, note in enumerate(used, start=1)}
    texts = [_written(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    texts[0] = [text + marks.get(notes.get(str(row[0]), ""), "") for text, row in zip(texts[0], rows)]
    cells = [[column.title, *below] for column, below in zip(columns, texts)]
    widths = [max(3, *map(len, column)) for column in cells]
    rules = [":" + "-" * (widths[0] - 1), *["-" * (width - 1) + ":" for width in widths[1:]]]
    padded = [
        [text.ljust(width) if i == 0 else text.rjust(width) for text in (column[0], rule, *column[1:])]
        for i, (column, rule, width) in enumerate(zip(cells, rules, widths))
    ]
    lines = [f"| {' | '.join(line)} |" for line in zip(*padded)]
    return "\n".join([*lines, *[f"\n{mark} {note}" for note, mark in marks.items()]])


def in_powers(summary: Summary | None) -> str | None:
    """A cell of two digits in powers of ten, for numbers of any size.

    >>> in_powers(Summary(0.00123, 0.0004, 5)), in_powers(Summary(12.0, None, 1))
    ('1.2e-03 ± 4e-04', '1.2e+01')
    """
    if summary is None:
        return None
    return f"{summary.mean:.1e}" + ("" if summary.std is None else f" ± {summary.std:.0e}")


def _written(column: Column, cells: Sequence[Cell]) -> list[str]:
    """The texts of a column, the best in bold: each one whose written mean equals the written best."""
    means = [cell.mean if isinstance(cell, Summary) else None if isinstance(cell, str) else cell for cell in cells]
    known = [float(mean) for mean in means if mean is not None and mean == mean]
    best = f"{column.best(known):.{column.decimals}f}" if column.best and known else None
    texts = []
    for cell, mean in zip(cells, means):
        text = _text(cell, column.decimals)
        texts.append(f"**{text}**" if best and mean is not None and f"{mean:.{column.decimals}f}" == best else text)
    return texts


def _text(cell: Cell, decimals: int) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Summary):
        spread = "" if cell.std is None else f" ± {cell.std:.{decimals}f}"
        return f"{cell.mean:.{decimals}f}{spread}"
    return f"{cell:.{decimals}f}" if isinstance(cell, float) else CONTROL.sub(" ", str(cell)).replace("|", "\\|")
