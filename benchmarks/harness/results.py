"""What was measured, read back from the files of the units."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from benchmarks.harness.errors import UsageError
from benchmarks.harness.store import Store
from benchmarks.harness.summary import Summary, summarise

Row = dict[str, Any]
"""A record together with the label and the seed of its unit."""


@dataclass(frozen=True)
class Results:
    """The records of the finished units of a grid."""

    labels: tuple[str, ...]
    """In the order of the grid, whether or not a unit of it has finished."""
    rows: tuple[Row, ...]
    headers: tuple[dict[str, Any], ...] = ()
    """One per finished unit: label, seed, config, seconds, peak_memory, started, commit."""
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """The units of the grid that have not finished."""
        return len(self.manifest.get("units", self.headers)) - len(self.headers)

    @property
    def quick(self) -> bool:
        return bool(self.manifest.get("options", {}).get("quick"))

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row["metric"] for row in self.rows))

    def config(self, label: str) -> dict[str, Any]:
        """The configuration of a label as a dict; empty while none of its units has finished."""
        return next((header["config"] for header in self.headers if header["label"] == label), {})

    def select(self, metric: str | None = None, label: str | None = None, **where: Any) -> list[Row]:
        """The rows of a metric and a label; further keywords select by any other key of the records."""
        if metric is not None and label is not None:
            found = self._places.get((metric, label), [])
        else:
            found = [row for row in self.rows if metric in (None, row["metric"]) and label in (None, row["label"])]
        return [row for row in found if all(row.get(key) == value for key, value in where.items())]

    def finals(self, metric: str, label: str, **where: Any) -> dict[int, float]:
        """By seed: the value at the last step, what a comparison seed by seed takes."""
        last: dict[int, Row] = {}
        for row in self.select(metric, label, **where):
            known = last.get(row["seed"])
            if known is None or last_step(row) >= last_step(known):
                last[row["seed"]] = row
        return {seed: row["value"] for seed, row in last.items()}

    def final(self, metric: str, label: str, **where: Any) -> Summary | None:
        """Over seeds: the value at the last step of each. None without rows; n is the number of seeds."""
        values = self.finals(metric, label, **where)
        return summarise(values.values()) if values else None

    def curve(self, metric: str, label: str, **where: Any) -> list[tuple[float, Summary]]:
        """Over seeds: the value at each step that all seeds of the label have, so that no seed enters half-way."""
        values: dict[int, dict[int, float]] = defaultdict(dict)
        for row in self.select(metric, label, **where):
            if row["step"] is not None:
                values[row["step"]][row["seed"]] = row["value"]
        seeds = {seed for at_step in values.values() for seed in at_step}
        shared = sorted(step for step, at_step in values.items() if len(at_step) == len(seeds))
        return [(float(step), summarise(values[step].values())) for step in shared]

    @cached_property
    def _places(self) -> dict[tuple[str, str], list[Row]]:
        """The rows by metric and label, since reports ask for hundreds of such pairs."""
        places: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            places[row["metric"], row["label"]].append(row)
        return dict(places)


def load(store: Store, command: str) -> Results:
    """The results of the grid of the last run. `command` is the one that would produce them."""
    if not store.manifest.exists():
        raise UsageError(f"there are no results in {store.root}. Run them first: {command}")
    manifest = json.loads(store.manifest.read_text(encoding="utf-8"))
    headers, rows = [], []
    for unit in manifest["units"]:
        header = store.header(unit["digest"])
        if header is not None:
            names = {"label": unit["label"], "seed": unit["seed"]}
            headers.append({**header, **names})
            rows += [{**record, **names} for record in store.records(unit["digest"])]
    if not headers:
        count = len(manifest["units"])
        raise UsageError(f"none of the {count} units in {store.root} has finished. Run them: {command}")
    labels = tuple(dict.fromkeys(unit["label"] for unit in manifest["units"]))
    return Results(labels, tuple(rows), tuple(headers), manifest)


def last_step(row: Row) -> float:
    """The step of a row, by which rows are ordered; one without a step comes before all."""
    return float("-inf") if row["step"] is None else row["step"]
