"""Places in a document that a command fills: between lines ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""

import re
from pathlib import Path

from benchmarks.harness.errors import UsageError

MARKER = re.compile(r"^\s*<!-- (?P<name>\S(?:.*\S)?):(?:begin|end) -->\s*$", re.MULTILINE)


def marked(document: str) -> list[str]:
    """The names of all markers, in their order.

    >>> marked("a\\n<!-- x/y:begin -->\\nold\\n<!-- x/y:end -->\\n`<!-- z:begin -->` in a line is none")
    ['x/y']
    """
    return list(dict.fromkeys(match["name"] for match in MARKER.finditer(document)))


def replaced(document: str, name: str, text: str, path: Path) -> str:
    """The document with `text` between its markers, an empty line around it. Raises UsageError for markers missing or
    out of order.

    >>> print(replaced("a\\n<!-- x:begin -->\\nold\\n<!-- x:end -->\\nb", "x", "new", Path("README.md")))
    a
    <!-- x:begin -->
    <BLANKLINE>
    new
    <BLANKLINE>
    <!-- x:end -->
    b
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    lines = document.splitlines(keepends=True)
    places = [[i for i, line in enumerate(lines) if line.strip() == marker] for marker in (begin, end)]
    if [len(found) for found in places] != [1, 1] or places[0] > places[1]:
        raise UsageError(
            f"{path} needs the line '{begin}' once and, below it, the line '{end}' once; "
            f"found {len(places[0])} and {len(places[1])}. Put them where the report belongs."
        )
    (first,), (last,) = places
    return "".join([*lines[: first + 1], f"\n{text.strip()}\n\n", *lines[last:]])
