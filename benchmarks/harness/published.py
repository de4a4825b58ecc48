"""Published results: of a results folder what its tables need, small enough to keep in the repository.

``benchmarks/experiments/<experiment>/published/<name>.json`` holds the manifest, the headers of the units (one
configuration for each label) and the records that are left, one line for each metric with its values over the units.
Documents show it between lines that cog fills (``python -m benchmarks readme``)::

    <!-- [[[cog from benchmarks.harness.published import show; show("compare", "tables") ]]] -->
    <!-- [[[end]]] -->
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.results import Results, Row, last_step, load
from benchmarks.harness.store import Store, write_atomically
from benchmarks.registry import EXPERIMENTS, Registered, found

COMPARED = ("Naive", "EWC", "CurvatureEWC Fisher, Kronecker, adaptive", "Replay", "JointTraining")
HEADLINE = (  # stream, published results, page, and the rows of Naive, EWC, CurvatureEWC, Replay and all at once
    ("permuted digits", "compare", "compare/README.md#permuted-digits", COMPARED),
    ("split MNIST, task-incremental", "compare-split_mnist-task", "compare/README.md#task-incremental", COMPARED),
    ("split MNIST, domain-incremental", "compare-split_mnist-domain", "compare/README.md#domain-incremental", COMPARED),
    ("split MNIST, class-incremental", "compare-split_mnist-class", "compare/README.md#class-incremental", COMPARED),
    (
        "permuted MNIST, ten tasks", "ewc_permuted_mnist", "ewc_permuted_mnist/README.md",
        ("Naive, as row 7", "1 Avalanche's recipe", "7 Kronecker", None, "multitask, as row 7"),
    ),
)  # fmt: skip

FOLDER = Path(__file__).parents[1] / "experiments"
Experiments: TypeAlias = Mapping[str, Registered]
LARGEST = 200_000
DIGITS = 6
UNIT_KEYS = ("label", "seed", "seconds", "peak_memory", "started", "commit")
TABLES = "tables"
FIGURE = re.compile(r"^!\[.*\]\(.*\)\n*", re.MULTILINE)
NOTES = "⁰¹²³⁴⁵⁶⁷⁸⁹"
NAMES = ("label", "seed", "metric", "value")


@dataclass(frozen=True)
class Watched(Results):
    """Results that know which metrics were asked for."""

    asked: set[str] = field(default_factory=set)

    def select(self, metric: str | None = None, label: str | None = None, **where: Any) -> list[Row]:
        self.asked.update(self.metrics if metric is None else [metric])
        return super().select(metric, label, **where)

shown: dict[str, tuple[Results, str]] = {}
"""The published results that documents have shown since cog began, and their reports."""


def files() -> dict[str, Path]:
    """The published files by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*/published/*.json"))}


def show(name: str, part: str = "") -> None:
    """Print by cog, for a document: the report over published results without its figures, or of it the section of a
    heading, or its "tables" alone. Raises UsageError for a name or a part that there is not."""
    import cog  # there while cog fills a document

    published = files()
    if name not in published:
        problem = unknown("published result", name, published) if published else "nothing is published."
        raise UsageError(f"{problem} Publish: python -m benchmarks publish FOLDER")
    if name not in shown:
        results = read(published[name])
        shown[name] = results, rendered(results, EXPERIMENTS)
    results, markdown = shown[name]
    cog.out(f"\n{excerpt(markdown, results, part)}\n\n")


def publish_folder(folder: Path, name: str | None, figures: Sequence[str], experiments: Experiments) -> list[str]:
    """Publish a results folder under a name (default: its own), with some of its figures, beside its experiment.
    Returns what to say of it. Raises UsageError for a figure that is not there, and as `publish`."""
    name = name or folder.resolve().name
    absent = [figure for figure in figures if not (folder / figure).is_file()]
    if absent:
        known = ", ".join(sorted(path.name for path in folder.glob("*.png"))) or "none"
        raise UsageError(f"there is no figure {', '.join(absent)} in {folder}. Those that are there: {known}.")
    results = read_results(folder)
    place = FOLDER / results.manifest["experiment"] / "published"
    path, dropped = publish(results, name, lambda some: rendered(some, experiments), place)
    kept = [place / (figure if Path(figure).stem == name else f"{name}-{figure}") for figure in figures]
    for figure, copy in zip(figures, kept):
        shutil.copyfile(folder / figure, copy)
    line = f"<!-- [[[cog from benchmarks.harness.published import show; show({name!r}) ]]] -->"
    return [str(path), f"dropped: {dropped}", *map(str, kept), f"To show it in a document: {line}, <!-- [[[end]]] -->"]


def rendered(results: Results, experiments: Experiments) -> str:
    """The report of the results' experiment over them, without its figures."""
    report = found(results.manifest.get("experiment", ""), experiments).report
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


def _short(commit: str | None) -> str:
    """Seven digits, and whether the checkout had changes."""
    if not commit:
        return "unknown"
    digits, _, changed = commit.partition("-")
    return digits[:7] + (f"-{changed}" if changed else "")


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
    command = json.loads(store.manifest.read_text(encoding="utf-8")).get("command", "python -m benchmarks run NAME")
    return load(store, command)


def publish(results: Results, name: str, render: Callable[[Results], str], folder: Path) -> tuple[Path, str]:
    """Write the shortest form of the results that renders as all of them do; returns the file and what it drops.

    Tried are in turn: of the metrics that the report asks for, the last record of each series rounded to six
    significant digits, the same exactly, all records rounded; then all records of all metrics, rounded. Raises
    UsageError where none both renders the same and stays below 200 kB.
    """
    watched = Watched(results.labels, results.rows, results.headers, results.manifest)
    expected = render(watched)
    asked = _of_metrics(results, watched.asked)
    finals = last_records(asked)
    others = ["metrics that no table takes"] if len(asked.rows) < len(results.rows) else []
    earlier, rounded = "records before the last of each series", f"numbers rounded to {DIGITS} significant digits"
    forms = [
        (_rounded(finals), [*others, earlier, rounded]),
        (finals, [*others, earlier]),
        (_rounded(asked), [*others, rounded]),
        (_rounded(results), [rounded]),
    ]
    sizes = []
    for form, dropped in forms:
        text = written(form)
        sizes.append(len(text.encode()))
        if sizes[-1] < LARGEST and render(parsed(text)) == expected:
            path = folder / f"{name}.json"
            write_atomically(path, text)
            kept = f"{sizes[-1] / 1000:.0f} kB, {len(form.rows)} of {len(results.rows)} records"
            return path, f"{', '.join(dropped)}; {kept}"
    raise UsageError(
        f"no short form of '{name}' gives the tables that all records give below {LARGEST // 1000} kB; tried "
        f"{', '.join(f'{size // 1000} kB' for size in sizes)}. Let the report take its tables from final values."
    )


def read(path: Path) -> Results:
    """A published file. Raises UsageError where it is none."""
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a published result ({error!r}). Publish it again: "
                         "python -m benchmarks publish FOLDER") from error  # fmt: skip


def written(results: Results) -> str:
    """The text of a published file: a JSON object with a line for each unit and each series."""
    units = [{key: header.get(key) for key in UNIT_KEYS} for header in results.headers]
    content: dict[str, Iterable[Any]] = {
        "manifest": [_portable(results.manifest)],
        "grid": [[unit["label"], unit["seed"]] for unit in results.manifest["units"]],
        "configs": [[label, results.config(label)] for label in results.labels if results.config(label)],
        "units": units,
        "records": _columns(results),
    }
    parts = [f"{json.dumps(name)}: [\n{_lines(lines)}\n]" for name, lines in content.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _portable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without its units, and without what its command and options say of one machine."""
    kept = {key: value for key, value in manifest.items() if key != "units"}
    command = re.sub(r" --(?:out|workers|jobs|scheduler)[ =](?:'[^']*'|\S+)", "", manifest.get("command", ""))
    command = re.sub(r"(--dataset-root)[ =](?:'[^']*'|\S+)", r"\1 DIR", command)
    options = {key: value for key, value in manifest.get("options", {}).items() if key != "dataset_root"}
    return {**kept, "command": command, "options": options}


def parsed(text: str) -> Results:
    """The results that a text of `written` holds."""
    content = json.loads(text)
    configs = dict(content["configs"])
    headers = tuple({**unit, "config": configs.get(unit["label"], {})} for unit in content["units"])
    grid = [{"label": label, "seed": seed} for label, seed in content["grid"]]
    rows: list[list[Row]] = [[] for _ in headers]
    for series in content["records"]:
        rest = {key: value for key, value in series.items() if key not in ("values", "units")}
        for unit, value in zip(series.get("units", range(len(headers))), series["values"]):
            rows[unit].append({**rest, "value": value, "label": headers[unit]["label"], "seed": headers[unit]["seed"]})
    labels = tuple(dict.fromkeys(unit["label"] for unit in grid))
    manifest = {**content["manifest"][0], "units": grid}
    return Results(labels, tuple(row for unit in rows for row in unit), headers, manifest)


def last_records(results: Results) -> Results:
    """The records without a step, and of each series of a unit that at the last step."""
    last: dict[str, int] = {}
    for place, row in enumerate(results.rows):
        key = _key({**row, "step": None}, ("label", "seed", "metric"))
        if row["step"] is not None and (key not in last or last_step(row) >= last_step(results.rows[last[key]])):
            last[key] = place
    kept = set(last.values())
    rows = tuple(row for place, row in enumerate(results.rows) if row["step"] is None or place in kept)
    return replace(results, rows=rows)


def _columns(results: Results) -> list[dict[str, Any]]:
    """The records by what they share: metric, step and further keys, with the values of the units that have them."""
    places = {(header["label"], header["seed"]): place for place, header in enumerate(results.headers)}
    series: dict[tuple[str, int], dict[str, Any]] = {}
    counts: dict[tuple[str, int], int] = {}
    for row in results.rows:
        unit = places[row["label"], row["seed"]]
        key = _key(row, ("metric",))
        count = counts[key, unit] = counts.get((key, unit), 0) + 1  # a unit may record the same series twice
        shared = {name: value for name, value in row.items() if name not in ("label", "seed", "value")}
        one = series.setdefault((key, count), {**shared, "units": [], "values": []})
        one["units"].append(unit)
        one["values"].append(row["value"])
    everyone = list(range(len(places)))
    return [
        {key: value for key, value in one.items() if key != "units" or value != everyone} for one in series.values()
    ]


def _key(row: Row, names: Iterable[str]) -> str:
    kept = {key: value for key, value in row.items() if key in names or key not in NAMES}
    return json.dumps(kept, sort_keys=True)


def _of_metrics(results: Results, metrics: Container[str]) -> Results:
    rows = tuple(row for row in results.rows if row["metric"] in metrics)
    return replace(results, rows=rows)


def _rounded(results: Results) -> Results:
    rows = tuple({**row, "value": float(f"{row['value']:.{DIGITS}g}")} for row in results.rows)
    return replace(results, rows=rows)


def _lines(items: Iterable[Any]) -> str:
    return ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items)


def headline() -> None:
    """Print by cog, for the README: the average accuracy after the last experience, by stream and method."""
    import cog  # there while cog fills a document

    lines = [
        "| stream | Naive | EWC | CurvatureEWC | Replay | all at once |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stream, name, page, labels in HEADLINE:
        results = read(files()[name])
        finals = [results.final("average_accuracy", label) if label else None for label in labels]
        cells = [f"{final.mean:.3f} ± {final.std:.3f}" if final else "–" for final in finals]
        lines.append(f"| [{stream}](benchmarks/experiments/{page}) | {' | '.join(cells)} |")
    cog.out("\n" + "\n".join(lines) + "\n\n")
