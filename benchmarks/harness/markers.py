"""A report between two markers of a document, where a later command can put a newer one.

The markers are lines of their own, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

import re
from pathlib import Path

from benchmarks.harness.errors import UsageError
from benchmarks.harness.results import Results
from benchmarks.harness.store import write_atomically


def insert(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` in a file. Raises UsageError for markers missing or out of order."""
    write_atomically(path, replaced(path.read_text(encoding="utf-8"), name, text, path))


def replaced(document: str, name: str, text: str, path: Path) -> str:
    """The document with `text` between its markers, an empty line around it.

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


def excerpt(markdown: str, results: Results) -> str:
    """A report for the middle of a document: its source instead of its title, lower headings, and no figures.

    >>> manifest = {"command": "python -m benchmarks run x"}
    >>> print(excerpt("# Title\\n\\n## Part\\n\\nText", Results((), (), ({"commit": "0123456789-dirty"},), manifest)))
    `python -m benchmarks run x` at commit 0123456-dirty.
    <BLANKLINE>
    #### Part
    <BLANKLINE>
    Text
    """
    commits = sorted({_short(header.get("commit")) for header in results.headers})
    source = f"`{results.manifest['command']}` at commit {', '.join(commits)}."
    if results.missing:
        source += f" {results.missing} of {len(results.manifest['units'])} units are missing."
    body = re.sub(r"\A# .*\n", "", markdown.strip())
    body = re.sub(r"^!\[.*\]\(.*\)\n*", "", body, flags=re.MULTILINE)
    body = re.sub(r"^(#+ )", r"##\1", body, flags=re.MULTILINE)
    return f"{source}\n\n{body.strip()}"


def _short(commit: str | None) -> str:
    """Seven digits, and whether the checkout had changes."""
    if not commit:
        return "unknown"
    digits, _, changed = commit.partition("-")
    return digits[:7] + (f"-{changed}" if changed else "")
