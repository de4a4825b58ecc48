"""``diff A B``: what two results folders have in common, what changed, and whether it is noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.experiment import is_timing
from benchmarks.harness.published import read_results
from benchmarks.harness.results import Results, Row, last_step
from benchmarks.harness.significance import IDENTICAL, LEVEL, Comparison, compared, holm
from benchmarks.harness.tables import Cell, Column, table

RESULTS = "Results"
FINGERPRINT = "weights"  # a sum over all weights, by which runs that are equal are known: no result to be tested
OWN = ("metric", "value", "step", "label", "seed", "timing")
APART = ("units", "seconds", "unit_seconds", "grid", "version", "workers", "threads_per_worker", "jobs")
"""What a manifest says of how a run went, rather than of what was run."""
OF_UNITS = {"seconds": ("seconds of a unit, s", 1.0), "peak_memory": ("peak memory of a unit, MiB", 2.0**20)}
LONGEST = 160

Changes = dict[str, dict[str, Comparison]]
"""By series (a metric with the further keys of its records) and label."""


def difference(a: Path, b: Path, metrics: Sequence[str] = ()) -> str:
    """Markdown that compares two results folders (or published files), each label with itself.

    `metrics` are those to compare, by their final values; by default all without steps, or all where there are none,
    but for the fingerprint of the weights.
    Raises UsageError where a folder holds no results, and for a metric that neither has.
    """
    before, after = read_results(a), read_results(b)
    rows = [*before.rows, *after.rows]
    known = dict.fromkeys(row["metric"] for row in rows)
    for name in metrics:
        if name not in known:
            raise UsageError(unknown("metric", name, known))
    plain = dict.fromkeys(row["metric"] for row in rows if row["step"] is None and row["metric"] != FINGERPRINT)
    chosen = metrics or list(plain or known)
    timings = {_series(row) for row in rows if row.get("timing") or is_timing(row["metric"])}
    ours, theirs = _finals(before, chosen), _finals(after, chosen)
    changes: Changes = {series: {} for series, _ in ours}
    for series, found in changes.items():
        for label in (label for label in before.labels if label in after.labels):
            if (series, label) in ours and (series, label) in theirs:
                found[label] = compared(ours[series, label], theirs[series, label])
    timings |= {series for series, _ in OF_UNITS.values()}
    lines = [
        "# What changed from A to B",
        f"- A: `{a}`, {_described(before)}\n- B: `{b}`, {_described(after)}",
        environment(before, after),
        coverage(before, after),
        _section(RESULTS, {series: found for series, found in changes.items() if series not in timings}),
        _section("Timings", {series: found for series, found in changes.items() if series in timings}),
    ]
    return "\n\n".join(line for line in lines if line)


def _series(row: Row) -> str:
    extra = ", ".join(f"{k}: {v}" for k, v in row.items() if k not in OWN and isinstance(v, str | int | float))
    return f"{row['metric']} ({extra})" if extra else row["metric"]


def _finals(results: Results, metrics: Sequence[str]) -> dict[tuple[str, str], dict[int, float]]:
    """By series and label: the last value of each seed; and what was measured of whole units."""
    found = [
        (_series(row), row["label"], row["seed"], last_step(row), row["value"])
        for metric in metrics for row in results.select(metric)
    ]  # fmt: skip
    found += [
        (name, header["label"], header["seed"], 0.0, header[key] / scale)
        for key, (name, scale) in OF_UNITS.items() for header in results.headers if header.get(key)
    ]  # fmt: skip
    frame = pd.DataFrame(found, columns=["series", "label", "seed", "step", "value"])
    unit = ["series", "label", "seed"]
    last = frame.sort_values("step", kind="stable").drop_duplicates(unit, keep="last").sort_index()
    groups = last.groupby(["series", "label"], sort=False)
    return {key: dict(zip(group["seed"], group["value"])) for key, group in groups}


def _described(results: Results) -> str:
    units = len(results.headers)
    missing = f" ({results.missing} missing)" if results.missing else ""
    return f"{results.manifest.get('experiment', '?')}, {units} units{missing}"


def _section(title: str, changes: Changes) -> str:
    """The changes of some series, corrected together: Holm over all their tests."""
    known = [change.p for found in changes.values() for change in found.values() if change.p is not None]
    corrected = iter(holm(known))
    blocks, verdicts, equal = [], [], []
    for series, found in changes.items():
        adjusted = [None if change.p is None else next(corrected) for change in found.values()]
        told = [change.verdict(p) for change, p in zip(found.values(), adjusted)]
        verdicts += told
        if set(told) == {IDENTICAL}:
            equal.append(f"- {series}: {', '.join(found)}")
        elif found:
            rows = [_row(*row) for row in zip(found, found.values(), adjusted, told)]
            blocks.append(f"### {series}\n\n{table(_columns(found.values()), rows)}")
    if not verdicts:
        return f"## {title}\n\nThere is no metric that both have for the same label." if title == RESULTS else ""
    if equal:
        blocks.append("### Identical in every seed\n\n" + "\n".join(equal))
    return "\n\n".join([f"## {title}", _method(len(known), verdicts), *blocks])


def _method(tests: int, verdicts: Sequence[str]) -> str:
    told = ", ".join(f"{count} {name.strip('*')}" for name, count in Counter(verdicts).items())
    return (
        f"{len(verdicts)} comparisons: {told}. Mean ± standard deviation over seeds. Tests: the paired t-test over "
        "shared seeds, Welch's where fewer than two are shared, none of fewer than three seeds or of a difference "
        f"that is the same in all; p is corrected for the {tests} tests of this section (Holm 1979) and beyond noise "
        f"below {LEVEL}. Effect: the difference in standard deviations, of the differences (paired) or of the root "
        "mean of both variances (Welch)."
    )


def _columns(found: Collection[Comparison]) -> list[Column]:
    """The columns, with about four digits of the largest mean."""
    means = [mean for change in found for mean in (change.a.mean, change.b.mean)]
    largest = max((abs(mean) for mean in means if isfinite(mean) and mean), default=1.0)
    decimals = 1 if largest >= 100 else 2 if largest >= 10 else 4 if largest >= 0.01 else 7
    return [
        Column("label"), Column("A", decimals), Column("B", decimals), Column("B − A"), Column("effect", 2),
        Column("test"), Column("p"), Column("p, Holm"), Column("verdict"),
    ]  # fmt: skip


def _row(label: str, found: Comparison, adjusted: float | None, verdict: str) -> list[Cell]:
    n = f"n = {found.a.n}" if found.a.n == found.b.n else f"n = {found.a.n} and {found.b.n}"
    test = n if found.p is None else f"{found.name}, {n}"
    written = ["–" if p is None else f"{p:.2g}" for p in (found.p, adjusted)]
    return [label, found.a, found.b, f"{found.difference:+.3g}", found.effect, test, *written, verdict]


def environment(a: Results, b: Results) -> str:
    """What the two ran with, where it is not the same."""
    before, after = (_flat({k: v for k, v in r.manifest.items() if k not in APART}) for r in (a, b))
    before["commit of the units"], after["commit of the units"] = (
        ", ".join(sorted({str(header.get("commit"))[:12] for header in results.headers})) for results in (a, b)
    )
    lines = [f"- {line}" for line in _changed(before, after)]
    if not lines:
        return "## Environment\n\nThe same command, options, commit, versions and machine."
    return "## Environment\n\nWhat is not listed is the same.\n\n" + "\n".join(lines)


def coverage(a: Results, b: Results) -> str:
    """Units of one side only, and labels whose configuration is not the same."""
    lines = []
    seeds = [{label: {h["seed"] for h in r.headers if h["label"] == label} for label in r.labels} for r in (a, b)]
    for name, one, other in (("A", *seeds), ("B", *seeds[::-1])):
        for label, own in one.items():
            alone = [str(seed) for seed in sorted(own - other.get(label, set()))]
            if alone:
                lines.append(f"- only in {name}: {label}, seed{'s' * (len(alone) > 1)} {', '.join(alone)}")
    for label in (label for label in a.labels if label in b.labels and a.config(label) and b.config(label)):
        lines += [f"- {label}: {line}" for line in _changed(_flat(a.config(label)), _flat(b.config(label)), "`")]
    return "## Units and configurations\n\n" + ("\n".join(lines) or "The same labels, seeds and configurations.")


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], quote: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            yield f"{quote}{key}{quote}{'' if quote else ':'} {_code(before.get(key))} → {_code(after.get(key))}"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted path."""
    if isinstance(value, dict):
        inner = [_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()]
        return {leaf: item for leaves in inner for leaf, item in leaves.items()}
    return {path: value}


def _code(value: Any) -> str:
    text = str(value)
    return "–" if value is None else f"`{text if len(text) <= LONGEST else text[: LONGEST - 1] + '…'}`"
