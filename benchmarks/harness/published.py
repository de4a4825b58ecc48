"""Published results: the part of a results folder that documents need, small enough for the repository.

``benchmarks/experiments/<experiment>/published/<name>.json`` holds what a report needs (`published_text`). Documents
show it between lines that cog fills (``python -m benchmarks readme``)::

    <!-- [[[cog from benchmarks.harness.published import show; show("compare", "Accuracy") ]]] -->
    <!-- [[[end]]] -->

``history/<date>-<commit>.json`` beside it holds the same of one commit each (``publish FOLDER --history``), which no
document has to show: a report compares with the one before (`predecessor`).
"""

import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from benchmarks.harness import reading
from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.published_text import UNIT_KEYS, key_of, parsed, written
from benchmarks.harness.results import Results, Row, last_step, load, read_manifest
from benchmarks.harness.store import Store, write_atomically
from benchmarks.harness.tables import Column, table
from benchmarks.registry import EXPERIMENTS, Registered, found

COMPARED = ("Naive", "EWC", "CurvatureEWC Fisher, Kronecker, adaptive", "Replay", "JointTraining")
HEADLINE = (  # stream, published results, page, and the rows of Naive, EWC, CurvatureEWC, Replay and all at once
    ("permuted digits", "compare", "compare/README.md#permuted-digits", COMPARED),
    ("split MNIST, task-incremental", "compare-split_mnist-task", "compare/README.md#task-incremental", COMPARED),
    ("split MNIST, domain-incremental", "compare-split_mnist-domain", "compare/README.md#domain-incremental", COMPARED),
    ("split MNIST, class-incremental", "compare-split_mnist-class", "compare/README.md#class-incremental", COMPARED),
    (
        "permuted MNIST, ten tasks", "ewc_permuted_mnist", "ewc_permuted_mnist/README.md",
        ("Naive, as row 7", "1 Avalanche's recipe", "7 Kronecker", "", "multitask, as row 7"),
    ),
)  # fmt: skip

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks/experiments"
DOCUMENTS = [ROOT / "README.md", ROOT / "avalanche_curv/README.md", *sorted((ROOT / "benchmarks").rglob("README.md"))]
LARGEST = 200_000
FIGURE = re.compile(r"^!\[.*\]\(.*\)\n*", re.MULTILINE)

Experiments: TypeAlias = Mapping[str, Registered]
shown: dict[str, tuple[Results, str]] = {}
"""The published results that documents have shown since `fill` began, with their reports."""


@dataclass(frozen=True)
class Watched(Results):
    """Results that collect in `asked` the metrics that a report selects, each with a label or None for all."""

    asked: set[tuple[str, str | None]] = field(default_factory=set)

    def select(self, metric: str | None = None, label: str | None = None, **keys: Any) -> list[Row]:
        self.asked.update((name, label) for name in (self.metrics if metric is None else [metric]))
        return super().select(metric, label, **keys)


def publish_folder(
    folder: Path, name: str | None, figures: Sequence[str], experiments: Experiments, *, history: bool = False
) -> list[str]:
    """Publish a results folder under a name (default: its own), with some of its figures, beside its experiment; or,
    as `history`, under its date and commit.

    Returns lines for the user. Raises UsageError for a figure that does not exist, for a name or figures of a history,
    and as `publish`.
    """
    if history:
        if name or figures:
            raise UsageError("--history names the file by date and commit, without figures: leave out --as, --figure.")
        results = read_results(folder)
        place = FOLDER / results.manifest["experiment"] / "history"
        return [*map(str, publish(results, dated(results), lambda some: rendered(some, experiments), place))]
    name = name or folder.resolve().name
    absent = [figure for figure in figures if not (folder / figure).is_file()]
    if absent:
        known = ", ".join(sorted(path.name for path in folder.glob("*.png"))) or "none"
        raise UsageError(f"there is no figure {', '.join(absent)} in {folder}. Its figures: {known}.")
    results = read_results(folder)
    place = FOLDER / results.manifest["experiment"] / "published"
    path, kept = publish(results, name, lambda some: rendered(some, experiments), place)
    copies = [place / (figure if Path(figure).stem == name else f"{name}-{figure}") for figure in figures]
    for figure, copy in zip(figures, copies):
        shutil.copyfile(folder / figure, copy)
    line = f"<!-- [[[cog from benchmarks.harness.published import show; show({name!r}) ]]] -->"
    left_out = [f"left out: {problem}" for problem in results.left_out]
    return [*left_out, str(path), kept, *map(str, copies), f"To show it in a document: {line}, <!-- [[[end]]] -->"]


def dated(results: Results) -> str:
    """The date and the commit of the newest unit, marked where its checkout had changes.

    >>> dated(Results((), (), ({"started": "2026-01-02T03:04:05+00:00", "commit": "0123456789-dirty"},)))
    '2026-01-02-0123456-dirty'
    """
    newest = max(results.headers, key=lambda header: header["started"])
    commit, dirty, _ = (newest.get("commit") or "unknown").partition("-dirty")
    return f"{newest['started'][:10]}-{commit[:7]}{dirty}"


def predecessor(results: Results) -> tuple[str, Results] | None:
    """The newest results in the history of an experiment that began before these, of the same labels and as quick: its
    name and they, on the same processor where there are any. None where there are none. A file that is none of a
    history is named on stderr and left out."""
    began = min(header["started"] for header in results.headers)
    processor = results.manifest.get("device")
    earlier = []
    for path in (FOLDER / results.manifest["experiment"] / "history").glob("*.json"):
        try:
            one = read(path).in_plain_text()
        except UsageError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        when = max((header["started"] for header in one.headers), default=began)  # without units as if it came later
        if when < began and (one.labels, one.quick) == (results.labels, results.quick):
            earlier.append((one.manifest.get("device") == processor, when, path.stem, one))
    return max(earlier, key=lambda found: found[:3])[2:] if earlier else None


def publish(results: Results, name: str, render: Callable[[Results], str], folder: Path) -> tuple[Path, str]:
    """Write the records that the report needs: those of its metrics, of the labels that it takes them of, at the last
    step of each series, or at all steps, or all records, whichever renders first as the results do.

    Returns the file and a line about its size. Raises UsageError where none renders the same, and above 200 kB.
    """
    watched = Watched(results.labels, results.rows, results.headers, results.manifest)
    expected = render(watched)
    asked = tuple(row for row in results.rows if {(row["metric"], None), (row["metric"], row["label"])} & watched.asked)
    for rows in (_last(asked), asked, results.rows):
        text = written(replace(results, rows=rows))
        with suppress(Exception):  # of a report that needs more records
            if render(parsed(text)) == expected:
                break
    else:
        raise UsageError(
            f"the report of '{name}' on all published records differs from that on the folder. Let it take all that it "
            f"shows from records, configurations, the manifest, and of units {', '.join(UNIT_KEYS)}."
        )
    size = len(text.encode())
    if size > LARGEST:
        raise UsageError(
            f"the records that the report of '{name}' needs take {size // 1000} kB, expected at most "
            f"{LARGEST // 1000} kB. Let the report take its tables from final values of fewer metrics."
        )
    path = folder / f"{name}.json"
    write_atomically(path, text)
    return path, f"{size / 1000:.0f} kB, {len(rows)} of {len(results.rows)} records"


def _last(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Of each series of a unit the record at its last step; records without a step all stay."""
    last: dict[Any, Row] = {}
    for place, row in enumerate(rows):
        key = place if row["step"] is None else key_of(row, "step", "value")
        if key not in last or last_step(row) >= last_step(last[key]):
            last[key] = row
    return tuple(last.values())


def read_results(path: Path) -> Results:
    """The results of a folder or of a published file. Raises UsageError for anything else."""
    if path.is_file() and path.suffix == ".json":
        return read(path)
    if not (path / "manifest.json").is_file():
        raise UsageError(
            f"'{path}' holds no results: expected a folder with manifest.json and units/, such as results/compare, or "
            "a published file."
        )
    store = Store(path)
    return load(store, read_manifest(store, "python -m benchmarks run NAME")["command"])


def read(path: Path) -> Results:
    """The results in a published file. Raises UsageError where it is none."""
    try:
        results = parsed(path.read_text(encoding="utf-8"))
        reading.mapping(results.manifest, "a manifest", experiment=str, command=str)
        for row in results.rows:
            reading.record(row)
        for header in results.headers:
            reading.header(header)
        return results
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UsageError(f"{path} is not a published result ({error!r}). Publish it again: "
                         "python -m benchmarks publish FOLDER, with --history in a history.") from error  # fmt: skip


def files() -> dict[str, Path]:
    """The published files by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*/published/*.json"))}


def show(name: str, part: str = "") -> None:
    """Print, while cog fills a document, the report over published results without its figures, or the section of it
    that has the heading `part`. Raises UsageError for an unknown name or heading."""
    import cog  # exists while cog fills a document

    published = files()
    if name not in published:
        problem = unknown("published result", name, published) if published else "nothing is published."
        raise UsageError(f"{problem} Publish: python -m benchmarks publish FOLDER")
    if name not in shown:
        results = read(published[name])
        shown[name] = results, rendered(results, EXPERIMENTS)
    results, markdown = shown[name]
    cog.out(f"\n{excerpt(markdown, results, part)}\n\n")


def headline() -> None:
    """Print, while cog fills the README, the average accuracy after the last experience, by stream and method."""
    import cog  # exists while cog fills a document

    rows = []
    for stream, name, page, labels in HEADLINE:
        results = read(files()[name])
        finals = [results.final("average_accuracy", label) for label in labels]
        rows.append([f"[{stream}](benchmarks/experiments/{page})", *finals])
    titles = ("stream", "Naive", "EWC", "CurvatureEWC", "Replay", "all at once")
    cog.out(f"\n{table([Column(title) for title in titles], rows)}\n\n")


def rendered(results: Results, experiments: Experiments) -> str:
    """The report of the results' experiment over them, without its figures."""
    report = found(results.manifest.get("experiment", ""), experiments).report
    with TemporaryDirectory() as folder:
        return FIGURE.sub("", report(results.in_plain_text(), Path(folder))).strip()


def excerpt(markdown: str, results: Results, part: str = "") -> str:
    """A report for the middle of a document: its source instead of its title, and its headings two levels lower.

    >>> manifest = {"command": "python -m benchmarks run x"}
    >>> results = Results((), (), ({"commit": "0123456789-dirty"},), manifest)
    >>> print(excerpt("# Title\\n\\n## Part\\n\\nText", results))
    `python -m benchmarks run x` at commit 0123456-dirty.
    <BLANKLINE>
    #### Part
    <BLANKLINE>
    Text
    """
    commits = sorted({re.sub(r"^(\w{7})\w*", r"\1", header.get("commit") or "unknown") for header in results.headers})
    command = abbreviated(results.manifest["command"])
    source = f"`{command}` at commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."
    if results.missing:
        source += f" {results.missing} of {len(results.manifest['units'])} units are missing."
    body = re.sub(r"\A# .*\n", "", markdown.strip())
    body = re.sub(r"^(#+ )", r"##\1", _section(body, part) if part else body, flags=re.MULTILINE)
    return f"{source}\n\n{body.strip()}"


def abbreviated(command: str, most: int = 3) -> str:
    """The command, with an option that occurs more than `most` times once and without its value.

    >>> abbreviated("run x --row a --row 'b c' --seeds 5 --row d --row e")
    'run x --row … --seeds 5'
    """
    options = re.compile(r" (--[\w-]+)[ =](?:'[^']*'|\S+)")
    for option, count in Counter(options.findall(command)).items():
        if count > most:
            one = re.compile(rf" {option}[ =](?:'[^']*'|\S+)")
            command = one.sub("", one.sub(f" {option}\0…", command, count=1)).replace("\0", " ")
    return command


def _section(body: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    lines = body.splitlines()
    levels = {i: len(found[1]) for i, line in enumerate(lines) if (found := re.match(r"(#+) ", line))}
    titles = {lines[i][level + 1 :].strip(): i for i, level in levels.items()}
    if heading not in titles:
        raise UsageError(unknown("part of a report", heading, titles))
    start = titles[heading]
    end = next((i for i, level in levels.items() if i > start and level <= levels[start]), len(lines))
    return "\n".join(lines[start + 1 : end])


def fill(paths: Sequence[Path] = (), check: bool = False) -> int:
    """Fill the documents (default: all), or with `check` only name those that are not current.

    Returns the exit status, 1 for such. Raises UsageError for a path that is not a file, for lines that cog or `show`
    cannot follow, and, of all documents, for published results that none of them shows.
    """
    changed = []
    shown.clear()
    for path in paths or [path for path in DOCUMENTS if path.exists()]:
        if not path.is_file():
            raise UsageError(f"expected a file, but '{path}' is none.")
        before = path.read_text(encoding="utf-8")
        after = filled(path, before)
        if after != before:
            changed.append(path)
            if not check:
                write_atomically(path, after)
    for name, place in files().items():
        if not paths and name not in shown:
            raise UsageError(f'{place} has no place in a document: show("{name}") it, or remove the file.')
    if check:
        for path in changed:
            print(f"{path}: not what its published results say.", file=sys.stderr)
        return 1 if changed else 0
    print("\n".join(f"{path} changed." for path in changed) or "Nothing changed.")
    return 0


def filled(path: Path, text: str) -> str:
    """The text of a document with the output of its lines for cog."""
    from cogapp.cogapp import Cog, CogError

    out, cog = StringIO(), Cog()
    cog.set_output(stdout=StringIO(), stderr=StringIO())
    cog.options.verbosity = 0
    try:
        cog.process_file(StringIO(text), out, str(path))
    except CogError as error:  # its last line is "...UsageError: message"
        raise UsageError(f"{path}: {str(error).strip().splitlines()[-1].rpartition('UsageError: ')[2]}") from error
    return out.getvalue()
