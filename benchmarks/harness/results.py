"""The measurements of a grid, read back from the files of its units: a table of records with typed columns."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import reading
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import columns
from benchmarks.harness.reading import Broken, content, plain, plain_values
from benchmarks.harness.store import Store

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
"""A record together with the label and the seed of its unit."""


@dataclass(frozen=True)
class Summary:
    """The mean of n values and their sample standard deviation, None for a single value."""

    mean: float
    std: float | None
    n: int


def summarise(values: Iterable[float]) -> Summary:
    """Mean and sample standard deviation, (1/(n − 1)) Σ (x − mean)² under the root. Raises ValueError without values.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(mean=2.0, std=1.0, n=3)
    """
    numbers = np.asarray(list(values), dtype=np.float64)
    if not numbers.size:
        raise ValueError("There is no value to summarise. Ask `Results.finals` first whether there are any.")
    with np.errstate(all="ignore"):  # a run that diverged gives an infinite or undefined mean, and a table that says so
        std = float(numbers.std(ddof=1)) if numbers.size > 1 else None
        return Summary(float(numbers.mean()), std, int(numbers.size))


@dataclass(frozen=True)
class Results:
    """The records of the finished units of a grid, or of those that `where` and `by` select from it.

    Reports select by columns, those of the configurations (see `experiment.columns`), and show labels::

        for rank, part in results.where(method="hard").by("rank"):
            part.final("accuracy"), part.first["strength"], part.label

    Methods that take a label may be called without it on results of a single label.
    """

    labels: tuple[str, ...]
    """In the order of the grid, whether or not a unit of it has finished."""
    rows: tuple[Row, ...]
    headers: tuple[dict[str, Any], ...] = ()
    """One per finished unit: label, seed, config, seconds, peak_memory, started, commit."""
    manifest: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """The files of finished units that could not be read, each with the reason; their units are missing."""

    def in_plain_text(self) -> Results:
        """The same results, with texts that Markdown takes for nothing else (`reading.plain`)."""
        return replace(
            self, labels=tuple(map(plain, self.labels)), rows=tuple(map(plain_values, self.rows)),
            headers=tuple(map(plain_values, self.headers)), manifest=plain_values(self.manifest),
        )  # fmt: skip

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row for each record: the unit's columns (label, seed, those of its configuration), then metric, step,
        value, and further keys of the records."""
        return self._frame(self.rows)

    @cached_property
    def units(self) -> pd.DataFrame:
        """One row for each finished unit: its columns, then seconds, peak_memory, started and commit."""
        return self._frame({key: value for key, value in unit.items() if key != "config"} for unit in self.headers)

    def _frame(self, rows: Iterable[Row]) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([{"label": row["label"], **self.columns.get(row["label"], {}), **row} for row in rows])

    @cached_property
    def columns(self) -> dict[str, dict[str, Any]]:
        """By label: the columns of its configuration; of labels with a finished unit, in the order of the grid."""
        configs = {header["label"]: header.get("config", {}) for header in self.headers}
        known = [label for label in self.labels if label in configs]
        return dict(zip(known, columns([configs[label] for label in known])))

    @property
    def first(self) -> dict[str, Any]:
        """The columns of the first label, for values that all labels share. Raises ValueError where no unit has
        finished."""
        if not self.columns:
            raise ValueError("No unit of this selection has finished. Ask `Results.columns` first whether one has.")
        return next(iter(self.columns.values()))

    @property
    def label(self) -> str:
        """The label of results that have one. Raises ValueError for others."""
        if len(self.labels) != 1:
            raise ValueError(f"Expected results of one label, got {len(self.labels)}: select by `where` or `by` first.")
        return self.labels[0]

    def where(self, **columns: Any) -> Results:
        """The part with those values in those columns; a callable selects the values of which it is true. Raises
        ValueError for a column that no configuration has."""
        known = {name for found in self.columns.values() for name in found}
        if self.columns and columns.keys() - known:
            raise ValueError(f"No column {sorted(columns.keys() - known)}; there are {sorted(known)}.")

        def fits(found: dict[str, Any]) -> bool:
            asked = ((found.get(name), value) for name, value in columns.items())
            return all(value(own) if callable(value) else own == value for own, value in asked)

        return self.of(label for label, found in self.columns.items() if fits(found))

    def by(self, *names: str) -> Iterator[tuple[Any, Results]]:
        """Pairs of a value of the column (of several columns: their values) and the part that has it, in the order of
        the grid."""
        groups: dict[str, tuple[Any, list[str]]] = {}
        for label, found in self.columns.items():
            values = [found.get(name) for name in names]
            groups.setdefault(json.dumps(values), (tuple(values), []))[1].append(label)
        for values, labels in groups.values():
            yield (values[0] if len(names) == 1 else values), self.of(labels)

    def each(self) -> Iterator[Results]:
        """The part of each label that has a finished unit, in the order of the grid."""
        return (self.of([label]) for label in self.columns)

    def of(self, labels: Iterable[str]) -> Results:
        """The part of some labels."""
        kept = set(labels)
        part = replace(
            self, labels=tuple(label for label in self.labels if label in kept),
            rows=tuple(row for row in self.rows if row["label"] in kept),
            headers=tuple(header for header in self.headers if header["label"] in kept),
        )  # fmt: skip
        part.__dict__["columns"] = {label: found for label, found in self.columns.items() if label in kept}
        return part

    @property
    def missing(self) -> int:
        """The number of units of the grid that have not finished."""
        return len(self.manifest.get("units", self.headers)) - len(self.headers)

    @property
    def quick(self) -> bool:
        """Whether this is a quick run."""
        return bool(self.manifest.get("options", {}).get("quick"))

    @property
    def tuning(self) -> bool:
        """Whether these are the strengths that an experiment tries before it begins (`tuning.SelfTuned`)."""
        return bool(self.manifest.get("options", {}).get("tuning"))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of all records."""
        return tuple(dict.fromkeys(row["metric"] for row in self.rows))

    def config(self, label: str) -> dict[str, Any]:
        """The configuration of a label as a dict; empty while none of its units has finished."""
        return next((header["config"] for header in self.headers if header["label"] == label), {})

    def select(self, metric: str | None = None, label: str | None = None, **keys: Any) -> list[Row]:
        """The rows of a metric and a label (default: of all); further keywords select by any other key of the
        records."""
        keys |= {} if label is None else {"label": label}
        rows = self.rows if metric is None else self._of_metric.get((metric, label), ())
        return [row for row in rows if all(row.get(key) == value for key, value in keys.items())]

    @cached_property
    def _of_metric(self) -> dict[tuple[str, str | None], list[Row]]:
        """The rows by metric, and by metric and label, since reports ask for hundreds of such pairs."""
        places: dict[tuple[str, str | None], list[Row]] = defaultdict(list)
        for row in self.rows:
            places[row["metric"], None].append(row)
            places[row["metric"], row["label"]].append(row)
        return places

    def finals(self, metric: str, label: str | None = None, **keys: Any) -> dict[int, float]:
        """By seed: the value at the last step, for comparisons seed by seed."""
        rows = self.select(metric, self.label if label is None else label, **keys)
        last = {row["seed"]: row["value"] for row in sorted(rows, key=last_step)}  # of equal steps the later record
        return {row["seed"]: last[row["seed"]] for row in rows}

    def final(self, metric: str, label: str | None = None, **keys: Any) -> Summary | None:
        """Over seeds: the value at the last step of each. None without rows; n is the number of seeds."""
        values = self.finals(metric, label, **keys)
        return summarise(values.values()) if values else None

    def curve(self, metric: str, label: str | None = None, **keys: Any) -> list[tuple[float, Summary]]:
        """Over seeds: the value at each step that all seeds of the label have, so that no seed enters half-way."""
        values: dict[int, dict[int, float]] = defaultdict(dict)
        for row in self.select(metric, self.label if label is None else label, **keys):
            if row["step"] is not None:
                values[row["step"]][row["seed"]] = row["value"]
        seeds = {seed for at_step in values.values() for seed in at_step}
        shared = sorted(step for step, at_step in values.items() if len(at_step) == len(seeds))
        return [(float(step), summarise(values[step].values())) for step in shared]


def load(store: Store, command: str) -> Results:
    """The results of the grid of the last run, without the units of which the file is broken: `Results.left_out` says
    which. `command` is the one that would produce them. Raises UsageError where there are none."""
    manifest = read_manifest(store, command)
    headers, rows, broken = [], [], []
    for unit in manifest["units"]:
        names = {"label": unit["label"], "seed": unit["seed"]}
        try:
            if store.finished(unit["digest"]):
                header, records = store.read(unit["digest"], **names)
                headers.append({**header, **names})
                rows += [{**record, **names} for record in records]
        except Broken as error:
            broken.append(str(error))
    if not headers:
        count, why = len(manifest["units"]), f" ({'; '.join(broken[:3])})" if broken else ""
        raise UsageError(f"none of the {count} units in {store.root} has finished{why}. Run them: {command}")
    labels = tuple(dict.fromkeys(unit["label"] for unit in manifest["units"]))
    return Results(labels, tuple(rows), tuple(headers), manifest, tuple(broken))


def read_manifest(store: Store, command: str) -> dict[str, Any]:
    """The manifest of a results folder. Raises UsageError where it has none that can be used; `command` is the one that
    would write it."""
    if not store.manifest.exists():
        raise UsageError(f"there are no results in {store.root}. Run them first: {command}")
    try:
        return content(store.manifest, reading.manifest)
    except Broken as error:
        raise UsageError(
            f"{error}. A run writes it again, and takes the units that have finished as they are: {command}"
        ) from None


def last_step(row: Row) -> float:
    """The step of a row, by which rows are ordered; one without a step comes before all."""
    return float("-inf") if row["step"] is None else row["step"]
