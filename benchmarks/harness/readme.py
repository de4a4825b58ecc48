"""The parts of the README that published results fill, and whether they are current.

The marker ``NAME`` stands for the whole report of ``benchmarks/published/NAME.json`` without its figures,
``NAME/tables`` for its tables alone, and ``NAME/Heading`` for the section of that heading.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.markers import marked, replaced
from benchmarks.harness.published import read
from benchmarks.harness.report import Report
from benchmarks.harness.results import Results

TABLES = "tables"
FIGURE = re.compile(r"^!\[.*\]\(.*\)\n*", re.MULTILINE)
NOTES = "⁰¹²³⁴⁵⁶⁷⁸⁹"
Load = Callable[[str], Report]


def filled(path: Path, load: Load, folder: Path) -> tuple[str, list[str]]:
    """The document with every marker filled from the published results, and the names of those that had changed.

    Raises UsageError for a marker that nothing published stands for, and for a published file that has no marker.
    """
    document = path.read_text(encoding="utf-8")
    published = {file.stem: file for file in sorted(folder.glob("*.json"))}
    wanted = {name: _source(name, published, path) for name in marked(document)}
    for name in published.keys() - set(wanted.values()):
        raise UsageError(
            f"{published[name]} has no place in {path}. Put the lines '<!-- {name}:begin -->' and "
            f"'<!-- {name}:end -->' where its tables belong, or remove the file."
        )
    reports = {name: (results := read(published[name]), rendered(results, load)) for name in set(wanted.values())}
    changed = []
    for name, source in wanted.items():
        results, markdown = reports[source]
        before, document = document, replaced(document, name, excerpt(markdown, results, _part(name)), path)
        if document != before:
            changed.append(name)
    return document, changed


def rendered(results: Results, load: Load) -> str:
    """The experiment's report over some results, without its figures."""
    report = load(results.manifest.get("experiment", ""))
    with TemporaryDirectory() as nowhere:
        return FIGURE.sub("", report(results, Path(nowhere))).strip()


def excerpt(markdown: str, results: Results, part: str = "") -> str:
    """A report for the middle of a document: its source instead of its title, and lower headings.

    >>> manifest = {"command": "python -m benchmarks run x"}
    >>> results = Results((), (), ({"commit": "0123456789-dirty"},), manifest)
    >>> print(excerpt("# Title\\n\\n## Part\\n\\nText", results))
    `python -m benchmarks run x` at commit 0123456-dirty.
    <BLANKLINE>
    #### Part
    <BLANKLINE>
    Text
    >>> print(excerpt("# Title\\n\\nText\\n\\n| a |\\n| - |", results, "tables").splitlines()[2:])
    ['| a |', '| - |']
    """
    commits = sorted({_short(header.get("commit")) for header in results.headers})
    command = abbreviated(results.manifest["command"])
    source = f"`{command}` at commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."
    if results.missing:
        source += f" {results.missing} of {len(results.manifest['units'])} units are missing."
    body = re.sub(r"\A# .*\n", "", markdown.strip())
    body = _tables(body) if part == TABLES else _section(body, part) if part else body
    body = re.sub(r"^(#+ )", r"##\1", body, flags=re.MULTILINE)
    return f"{source}\n\n{body.strip()}"


def abbreviated(command: str, most: int = 3) -> str:
    """The command with an option that is given more than `most` times written once, without its value.

    >>> abbreviated("run x --row a --row 'b c' --seeds 5 --row d --row e")
    'run x --row … --seeds 5'
    """
    options = re.compile(r" (--[\w-]+)[ =](?:'[^']*'|\S+)")
    counts = Counter(options.findall(command))
    seen: set[str] = set()

    def once(found: re.Match[str]) -> str:
        option = found[1]
        if counts[option] <= most:
            return found[0]
        first = option not in seen
        seen.add(option)
        return f" {option} …" if first else ""

    return options.sub(once, command)


def _tables(body: str) -> str:
    """The blocks that are tables, or notes below one."""
    blocks = re.split(r"\n{2,}", body)
    return "\n\n".join(block for block in blocks if block.startswith(("|", *NOTES)))


def _section(body: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    lines = body.splitlines()
    levels = {i: len(found[1]) for i, line in enumerate(lines) if (found := re.match(r"(#+) ", line))}
    titles = {lines[i][level + 1 :].strip(): i for i, level in levels.items()}
    if heading not in titles:
        raise UsageError(unknown("part of a report", heading, [TABLES, *titles]))
    start = titles[heading]
    end = next((i for i, level in levels.items() if i > start and level <= levels[start]), len(lines))
    return "\n".join(lines[start + 1 : end])


def _source(marker: str, published: dict[str, Path], path: Path) -> str:
    name = marker.partition("/")[0]
    if name not in published:
        problem = unknown("published result", name, published) if published else "nothing is published."
        raise UsageError(f"{path} has the marker '{marker}': {problem} Publish: python -m benchmarks publish FOLDER")
    return name


def _part(marker: str) -> str:
    return marker.partition("/")[2]


def _short(commit: str | None) -> str:
    """Seven digits, and whether the checkout had changes."""
    if not commit:
        return "unknown"
    digits, _, changed = commit.partition("-")
    return digits[:7] + (f"-{changed}" if changed else "")
