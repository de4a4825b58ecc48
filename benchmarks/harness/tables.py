"""Markdown tables that read well as plain text too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
    """A Markdown table. The first column names the rows; `footnotes` gives, for such a name, what to know about that
    row, and rows with the same note share its mark.

    >>> print(table([Column("strategy"), Column("accuracy", 2, max)], [["Naive", Summary(0.5, 0.1, 3)], ["EWC", 0.75]]))
    | strategy |    accuracy |
    | :------- | ----------: |
    | Naive    | 0.50 ± 0.10 |
    | EWC      |    **0.75** |
    """
    notes = footnotes or {}
    marks = _marks(rows, notes)
    names = [_text(row[0]) + marks.get(notes.get(str(row[0]), ""), "") for row in rows]
    numbers = [_written(column, [row[i] for row in rows]) for i, column in enumerate(columns[1:], start=1)]
    cells = [[column.title for column in columns], *[list(row) for row in zip(names, *numbers)]]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    rule = [":" + "-" * (widths[0] - 1), *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines = [_line(cells[0], widths), _line(rule, widths), *[_line(row, widths) for row in cells[1:]]]
    lines += [f"\n{mark} {note}" for note, mark in marks.items()]
    return "\n".join(lines)


def _marks(rows: Sequence[Sequence[Cell]], notes: Mapping[str, str]) -> dict[str, str]:
    """Superscript numbers of the notes, in the order in which the rows use them."""
    used = dict.fromkeys(notes[str(row[0])] for row in rows if str(row[0]) in notes)
    return {note: str(number).translate(SUPERSCRIPTS) for number, note in enumerate(used, start=1)}


def _written(column: Column, cells: Sequence[Cell]) -> list[str]:
    """The texts of a column, the best in bold: each one whose written mean equals the written best."""
    means = [_mean(cell) for cell in cells]
    known = [mean for mean in means if mean is not None and mean == mean]
    best = f"{column.best(known):.{column.decimals}f}" if column.best and known else None
    texts = []
    for cell, mean in zip(cells, means):
        text = _text(cell, column.decimals)
        is_best = mean is not None and f"{mean:.{column.decimals}f}" == best
        texts.append(f"**{text}**" if is_best else text)
    return texts


def _mean(cell: Cell) -> float | None:
    if isinstance(cell, Summary):
        return cell.mean
    return None if cell is None or isinstance(cell, str) else float(cell)


def _text(cell: Cell, decimals: int = 3) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Summary):
        spread = "" if cell.std is None else f" ± {cell.std:.{decimals}f}"
        return f"{cell.mean:.{decimals}f}{spread}"
    if isinstance(cell, float):
        return f"{cell:.{decimals}f}"
    return str(cell).replace("|", "\\|")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    aligned = [cells[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]]
    return f"| {' | '.join(aligned)} |"
