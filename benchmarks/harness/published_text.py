"""The text of a published file: a JSON object with a line for each label and each series.

It holds the manifest, the headers of the units by label, one configuration for each label, as far as it is not that of
the label before, and the records, one line for each series with its values over the units. Labels and commits are
places in its `texts`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.harness.results import Results, Row

UNIT_KEYS = ("label", "seed", "seconds", "peak_memory", "started", "commit")
TEXTS = ("label", "commit")  # of these
AS_BEFORE = "as before, but"


def written(results: Results) -> str:
    """The text that holds these results."""
    grid, headers = results.manifest["units"], results.headers
    texts = [
        *dict.fromkeys([*(unit["label"] for unit in [*grid, *headers]), *(unit.get("commit") for unit in headers)])
    ]
    place = {text: number for number, text in enumerate(texts)}
    configs = [(label, results.config(label)) for label in results.labels if results.config(label)]
    content: dict[str, list[Any]] = {
        "manifest": [_portable(results.manifest)],
        "texts": texts,
        "grid": [[place[label], *(unit["seed"] for unit in units)] for label, units in _by_label(grid)],
        "configs": [
            [place[label], *_told(before, label, config)]
            for (_, before), (label, config) in zip([("", {}), *configs], configs)
        ],
        "units": [
            _together([
                {key: place[unit.get(key)] if key in TEXTS else unit.get(key) for key in UNIT_KEYS} for unit in units
            ])
            for _, units in _by_label(headers)
        ],
        "records": _series(results),
    }  # fmt: skip
    parts = []
    for name, items in content.items():
        lines = [json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in items]
        parts.append(f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _portable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without its units, and without the parts of its command and options that belong to one machine."""
    command = re.sub(r" --(?:out|workers|jobs|scheduler)[ =](?:'[^']*'|\S+)", "", manifest.get("command", ""))
    command = re.sub(r"(--dataset-root)[ =](?:'[^']*'|\S+)", r"\1 DIR", command)
    options = {key: value for key, value in manifest.get("options", {}).items() if key != "dataset_root"}
    return {key: value for key, value in manifest.items() if key != "units"} | {"command": command, "options": options}


def _by_label(units: Iterable[Row]) -> Iterator[tuple[str, Iterator[Row]]]:
    """Units that follow each other with the same label."""
    return groupby(units, key=lambda unit: unit["label"])


def _together(units: Sequence[Row]) -> Row:
    """What units say: of each key what all of them say, or the list of what they say.

    >>> _together([{"label": "a", "seed": 0}, {"label": "a", "seed": 1}])
    {'label': 'a', 'seed': [0, 1]}
    """
    told = {key: [unit[key] for unit in units] for key in units[0]}
    return {key: said[0] if all(one == said[0] for one in said) else said for key, said in told.items()}


def _apart(told: Row) -> list[Row]:
    """The units that `_together` was given."""
    count = next((len(said) for said in told.values() if isinstance(said, list)), 1)
    return [{key: said[i] if isinstance(said, list) else said for key, said in told.items()} for i in range(count)]


def _told(before: Row, label: str, config: Row) -> list[Any]:
    """A configuration: whole, or what of it is not as in the one before, but for its label."""
    change = _change(before | ({"label": label} if "label" in before else {}), config)
    same = change is not config and _changed(before, {"label": label, **change}) == config
    return [AS_BEFORE, change] if same else [config]


def _change(before: Any, after: Any) -> Any:
    """What of `after` differs from `before`, where both are described dataclasses of one class; else all of it."""
    alike = isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys()
    if not alike or "class" not in after or before["class"] != after["class"]:
        return after
    return {key: _change(before[key], own) for key, own in after.items() if json.dumps(own) != json.dumps(before[key])}


def _changed(before: Any, change: Any) -> Any:
    """`after` of `_change`."""
    whole = not isinstance(before, dict) or not isinstance(change, dict) or "class" not in before or "class" in change
    if whole:
        return change
    return {key: _changed(known, change[key]) if key in change else known for key, known in before.items()}


def _series(results: Results) -> list[dict[str, Any]]:
    """The records by their shared keys (metric, step, ...), each with its values and the units that have them."""
    places = {(header["label"], header["seed"]): place for place, header in enumerate(results.headers)}
    series: dict[Any, dict[str, Any]] = {}
    counts = Counter[Any]()
    for row in results.rows:
        unit, key = places[row["label"], row["seed"]], key_of(row, "label", "seed", "value")
        counts[key, unit] += 1  # a unit may record the same series twice
        shared = {name: value for name, value in row.items() if name not in ("label", "seed", "value")}
        one = series.setdefault((key, counts[key, unit]), {**shared, "units": [], "values": []})
        one["units"].append(unit)
        one["values"].append(row["value"])
    for one in series.values():
        if one["units"] == list(range(len(places))):  # all
            del one["units"]
    return list(series.values())


def parsed(text: str) -> Results:
    """The results that a text of `written` holds."""
    content = json.loads(text)
    texts = content["texts"]
    configs, before = dict[str, Row](), Row()
    for place, *told in content["configs"]:
        label = texts[place]
        before = configs[label] = told[0] if len(told) == 1 else _changed(before, {"label": label, **told[1]})
    units = [unit | {key: texts[unit[key]] for key in TEXTS} for told in content["units"] for unit in _apart(told)]
    headers = tuple({**unit, "config": configs.get(unit["label"], {})} for unit in units)
    grid = [{"label": texts[label], "seed": seed} for label, *seeds in content["grid"] for seed in seeds]
    rows: list[list[Row]] = [[] for _ in headers]
    for series in content["records"]:
        rest = {key: value for key, value in series.items() if key not in ("values", "units")}
        for unit, value in zip(series.get("units", range(len(headers))), series["values"]):
            rows[unit].append({**rest, "value": value, "label": headers[unit]["label"], "seed": headers[unit]["seed"]})
    labels = tuple(dict.fromkeys(unit["label"] for unit in grid))
    manifest = {**content["manifest"][0], "units": grid}
    return Results(labels, tuple(row for unit in rows for row in unit), headers, manifest)


def key_of(row: Row, *without: str) -> str:
    """What a record is a value of: all that it says, but for these keys."""
    return json.dumps({key: value for key, value in row.items() if key not in without}, sort_keys=True)
