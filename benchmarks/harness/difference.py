"""``diff A B``: what two results folders have in common, what changed, and whether it is noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.experiment import is_timing
from benchmarks.harness.published import read_results
from benchmarks.harness.results import Results
from benchmarks.harness.setup_difference import coverage, environment
from benchmarks.harness.significance import IDENTICAL, LEVEL, Comparison, compared, holm
from benchmarks.harness.tables import Cell, Column, table

RESULTS = "Results"
FINGERPRINT = "weights"  # a sum over all weights, by which runs that are equal are known: no result to be tested
NAMES = ("metric", "value", "step", "label", "seed", "timing")

Series = tuple[str, tuple[tuple[str, Any], ...]]
"""A metric and the further keys of its records."""


@dataclass(frozen=True)
class Change:
    """One label in one series."""

    label: str
    comparison: Comparison


def difference(a: Path, b: Path, metrics: Sequence[str] = ()) -> str:
    """Markdown that compares two results folders (or published files), each label with itself.

    `metrics` are those to compare, by their final values; by default all without steps, or all where there are none,
    but for the fingerprint of the weights.
    Raises UsageError where a folder holds no results, and for a metric that neither has.
    """
    before, after = read_results(a), read_results(b)
    chosen = metrics or _default(before, after)
    for name in metrics:
        known = {*before.metrics, *after.metrics}
        if name not in known:
            raise UsageError(unknown("metric", name, known))
    series = [one for name in chosen for one in _series(name, before, after)]
    marked = {row["metric"] for row in (*before.rows, *after.rows) if row.get("timing")}
    timings = [one for one in series if one[0] in marked or is_timing(one[0])]
    results = [one for one in series if one not in timings]
    changes = {one: _changes(one, before, after) for one in series}
    lines = [
        "# What changed from A to B",
        f"- A: `{a}`, {_told(before)}\n- B: `{b}`, {_told(after)}",
        environment(before, after),
        coverage(before, after),
        _section(RESULTS, {one: changes[one] for one in results}),
        _section("Timings", {one: changes[one] for one in timings} | _of_units(before, after)),
    ]
    return "\n\n".join(line for line in lines if line)


def _told(results: Results) -> str:
    units = len(results.headers)
    missing = f" ({results.missing} missing)" if results.missing else ""
    return f"{results.manifest.get('experiment', '?')}, {units} units{missing}"


def _default(a: Results, b: Results) -> list[str]:
    rows = [*a.rows, *b.rows]
    plain = dict.fromkeys(row["metric"] for row in rows if row["step"] is None and row["metric"] != FINGERPRINT)
    return list(plain or dict.fromkeys(row["metric"] for row in rows))


def _series(metric: str, a: Results, b: Results) -> list[Series]:
    found: dict[Series, None] = {}
    for results in (a, b):
        for row in results.select(metric):
            extra = tuple((k, v) for k, v in row.items() if k not in NAMES and isinstance(v, str | int | float))
            found[metric, extra] = None
    return list(found)


def _changes(series: Series, a: Results, b: Results) -> list[Change]:
    metric, extra = series
    found = []
    for label in (label for label in a.labels if label in b.labels):
        ours, theirs = (results.finals(metric, label, **dict(extra)) for results in (a, b))
        if ours and theirs:
            found.append(Change(label, compared(ours, theirs)))
    return found


def _of_units(a: Results, b: Results) -> dict[Series, list[Change]]:
    """Seconds and peak memory of whole units, from their headers."""
    found: dict[Series, list[Change]] = {}
    for key, unit, scale in (("seconds", "s", 1.0), ("peak_memory", "MiB", 2.0**20)):
        changes = []
        for label in (label for label in a.labels if label in b.labels):
            ours, theirs = (
                {h["seed"]: h[key] / scale for h in results.headers if h["label"] == label and h.get(key)}
                for results in (a, b)
            )
            if ours and theirs:
                changes.append(Change(label, compared(ours, theirs)))
        if changes:
            found[f"{key.replace('_', ' ')} of a unit, {unit}", ()] = changes
    return found


def _section(title: str, changes: dict[Series, list[Change]]) -> str:
    """The changes of some series, corrected together: Holm over all their tests."""
    tested = [change.comparison.p for found in changes.values() for change in found]
    known = [p for p in tested if p is not None]
    corrected = iter(holm(known))
    blocks, verdicts, equal = [], [], []
    for series, found in changes.items():
        adjusted = [None if change.comparison.p is None else next(corrected) for change in found]
        told = [change.comparison.verdict(p) for change, p in zip(found, adjusted)]
        verdicts += told
        if set(told) == {IDENTICAL}:
            equal.append(f"- {_name(series)}: {', '.join(change.label for change in found)}")
        elif found:
            rows = [_row(*row) for row in zip(found, adjusted, told)]
            blocks.append(f"### {_name(series)}\n\n{table(_columns(found), rows)}")
    if not verdicts:
        return f"## {title}\n\nThere is no metric that both have for the same label." if title == RESULTS else ""
    if equal:
        blocks.append("### Identical in every seed\n\n" + "\n".join(equal))
    return "\n\n".join([f"## {title}", _method(len(known), verdicts), *blocks])


def _method(tests: int, verdicts: Sequence[str]) -> str:
    counts = {name: verdicts.count(name) for name in dict.fromkeys(verdicts)}
    told = ", ".join(f"{count} {name.strip('*')}" for name, count in counts.items())
    return (
        f"{len(verdicts)} comparisons: {told}. Mean ± standard deviation over seeds. Tests: the paired t-test over "
        "shared seeds, Welch's where fewer than two are shared, none of fewer than three seeds or of a difference "
        f"that is the same in all; p is corrected for the {tests} tests of this section (Holm 1979) and beyond noise "
        f"below {LEVEL}. Effect: the difference in standard deviations, of the differences (paired) or of the root "
        "mean of both variances (Welch)."
    )


def _columns(found: Sequence[Change]) -> list[Column]:
    """The columns, with about four digits of the largest mean."""
    means = [mean for change in found for mean in (change.comparison.a.mean, change.comparison.b.mean)]
    largest = max((abs(mean) for mean in means if isfinite(mean) and mean), default=1.0)
    decimals = 1 if largest >= 100 else 2 if largest >= 10 else 4 if largest >= 0.01 else 7
    return [
        Column("label"), Column("A", decimals), Column("B", decimals), Column("B − A"), Column("effect", 2),
        Column("test"), Column("p"), Column("p, Holm"), Column("verdict"),
    ]  # fmt: skip


def _row(change: Change, adjusted: float | None, verdict: str) -> list[Cell]:
    found = change.comparison
    n = f"n = {found.a.n}" if found.a.n == found.b.n else f"n = {found.a.n} and {found.b.n}"
    test = n if found.p is None else f"{found.name}, {n}"
    written = ["–" if p is None else f"{p:.2g}" for p in (found.p, adjusted)]
    return [change.label, found.a, found.b, f"{found.difference:+.3g}", found.effect, test, *written, verdict]


def _name(series: Series) -> str:
    metric, extra = series
    told = ", ".join(f"{key}: {value}" for key, value in extra)
    return f"{metric} ({told})" if told else metric
