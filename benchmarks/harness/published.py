"""Published results: of a results folder what its tables need, small enough to keep in the repository.

``benchmarks/published/<name>.json`` holds the manifest, the headers of the units (one configuration for each label) and
the records that are left, one line for each metric with its values over the units.
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import UsageError
from benchmarks.harness.results import Results, Row, last_step, load
from benchmarks.harness.store import Store, write_atomically

FOLDER = Path(__file__).parents[1] / "published"
FIGURES = Path(__file__).parents[1] / "figures"
LARGEST = 200_000
DIGITS = 6
UNIT_KEYS = ("label", "seed", "seconds", "peak_memory", "started", "commit")
NAMES = ("label", "seed", "metric", "value")


@dataclass(frozen=True)
class Watched(Results):
    """Results that know which metrics were asked for."""

    asked: set[str] = field(default_factory=set)

    def select(self, metric: str | None = None, label: str | None = None, **where: Any) -> list[Row]:
        self.asked.update(self.metrics if metric is None else [metric])
        return super().select(metric, label, **where)


def read_results(path: Path) -> Results:
    """The results of a folder or of a published file. Raises UsageError for anything else."""
    if path.is_file() and path.suffix == ".json":
        return read(path)
    if not (path / "manifest.json").is_file():
        raise UsageError(
            f"'{path}' holds no results: expected a folder with manifest.json and units/, such as results/compare, or "
            "a file of benchmarks/published."
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
    return Results(results.labels, rows, results.headers, results.manifest)


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
    return Results(results.labels, rows, results.headers, results.manifest)


def _rounded(results: Results) -> Results:
    rows = tuple({**row, "value": float(f"{row['value']:.{DIGITS}g}")} for row in results.rows)
    return Results(results.labels, rows, results.headers, results.manifest)


def _lines(items: Iterable[Any]) -> str:
    return ",\n".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items)
