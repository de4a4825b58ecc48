"""What a terminal shows of a report: the title, the first table in the width that there is, and where the rest is."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.harness.tables import SUPERSCRIPTS

MOST = 10  # rows
LEAST = 26  # characters that labels have before columns go
WIDE = 200  # columns where nobody's terminal sets a width, as in a pipe
GAP = 2
BAR = re.compile(r"(?<!\\)\|")
SPREAD = re.compile(r" ± \S+")
MARKS = "".join(map(chr, SUPERSCRIPTS.values()))

Rows = list[list[str]]


@dataclass(frozen=True)
class Glance:
    """What comes first where a table has no room for all, ``GLANCE`` in an experiment's ``report.py``: rows by their
    first cell, and columns by the beginning of their title, each with what it means (or "")."""

    rows: Sequence[str] = ()
    columns: Mapping[str, str] = field(default_factory=dict)


def show(markdown: str, glance: Glance, places: Sequence[str], width: int | None = None) -> None:
    """Print the title of a report and its first table, at most ten rows of it, then `places`, a line each.

    In a terminal (or with COLUMNS set) the table fits: spreads behind the first numbers go first, then columns that the
    glance does not name, then parts of long labels and columns from the right. Elsewhere it is plain text without
    control characters.
    """
    from rich.console import Console
    from rich.text import Text

    if width is None and not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        width = WIDE
    console = Console(file=sys.stdout, width=width, highlight=False)
    title, rows = first_table(markdown)
    if title:
        console.print(Text(title, style="bold"), Text(), sep="\n")
    if rows:
        kept = _first(rows, glance)
        order, needed = _order(rows[0], glance)
        shown = fitted([[row[place] for place in order] for row in kept], needed, console.width)
        console.print(_drawn(shown, console.width))
        if more := len(rows) - len(kept):
            console.print(f"{more} more rows are in the report.", soft_wrap=True)
        for begin, meaning in glance.columns.items():
            if meaning and any(column.startswith(begin) for column in shown[0]):
                console.print(Text(f"{begin}: {meaning}"))
        console.print()
    for line in places:
        console.print(Text(line), soft_wrap=True)  # paths stay whole, to be copied


def first_table(markdown: str) -> tuple[str, Rows]:
    """The first heading and the first table of a Markdown text, its head first, as plain cells; the best are still set
    in ``**``.

    >>> first_table("# A\\n\\n| row | a\\\\|b |\\n| :-- | --: |\\n| EWC¹ | **1** |\\n\\n¹ note")
    ('A', [['row', 'a|b'], ['EWC', '**1**']])
    """
    lines = markdown.splitlines()
    title = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    begin = next((place for place, line in enumerate(lines) if line.startswith("|")), len(lines))
    end = next((place for place in range(begin, len(lines)) if not lines[place].startswith("|")), len(lines))
    rows = [[_plain(cell.strip()) for cell in BAR.split(line)[1:-1]] for line in lines[begin:end]]
    table = [[row[0].rstrip(MARKS), *row[1:]] for row in rows[:1] + rows[2:]]
    return _plain(title), table


def _plain(text: str) -> str:
    return text.replace("\\|", "|").replace("\\]", "]").replace("&lt;", "<")


def _first(rows: Rows, glance: Glance) -> Rows:
    """The head, and at most ten rows, those of the glance before others, in the order of the table."""
    places = sorted(range(1, len(rows)), key=lambda place: rows[place][0] not in glance.rows)
    return [rows[0], *(rows[place] for place in sorted(places[:MOST]))]


def _order(head: Sequence[str], glance: Glance) -> tuple[list[int], int]:
    """The places of the columns, the first one and those of the glance before others; and how many these are, all
    where the glance names none."""
    named = [0, *(place for begin in glance.columns for place, title in enumerate(head) if title.startswith(begin))]
    order = list(dict.fromkeys([*named, *range(len(head))]))
    return order, len(set(named)) if len(named) > 1 else len(order)


def fitted(rows: Rows, needed: int, width: int) -> Rows:
    """The rows in a width: columns behind those that are `needed` stay where labels stay whole. Labels stay whole, on
    two lines, where their shortened forms would be equal."""
    longest = max(len(row[0]) for row in rows)
    if width - _others(rows) < longest:
        rows = [[*row[:2], *(SPREAD.sub("", cell) for cell in row[2:])] for row in rows]
    while len(rows[0]) > 2 and width - _others(rows) < (longest if len(rows[0]) > needed else min(longest, LEAST)):
        rows = [row[:-1] for row in rows]
    labels = [shortened(row[0], max(width - _others(rows), GAP)) for row in rows]
    return [[label, *row[1:]] for label, row in zip(labels, rows)] if len(set(labels)) == len(rows) else rows


def _others(rows: Rows) -> int:
    """The width of all columns but the first."""
    return sum(GAP + max(len(cell.replace("**", "")) for cell in column) for column in list(zip(*rows))[1:])


def shortened(text: str, width: int) -> str:
    """A text without words in its middle, or without its end.

    >>> shortened("CurvatureEWC Fisher, Kronecker, adaptive", 27), shortened("ShrinkAndPerturb", 10)
    ('CurvatureEWC … adaptive', 'ShrinkAnd…')
    """
    words = text.split()
    ends = (f"{words[0]} … {' '.join(words[place:])}" for place in range(2, len(words)))
    return text if len(text) <= width else next((end for end in ends if len(end) <= width), f"{text[: width - 1]}…")


def _drawn(rows: Rows, width: int) -> object:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for place, title in enumerate(rows[0]):
        most = None if place else max(width - _others(rows), LEAST // 2)  # a label that is longer takes two lines
        table.add_column(Text(title), justify="right" if place else "left", no_wrap=bool(place), max_width=most)
    for row in rows[1:]:
        table.add_row(*(Text(cell.replace("**", ""), "bold" if cell.startswith("**") else "") for cell in row))
    return table
