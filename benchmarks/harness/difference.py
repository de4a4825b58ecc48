"""``diff A B``: the differences between two results folders, and which of them are beyond noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.experiment import is_timing
from benchmarks.harness.published import read_results
from benchmarks.harness.reading import code
from benchmarks.harness.results import Results, Row, last_step
from benchmarks.harness.significance import LEVEL, Comparison, compared, corrected
from benchmarks.harness.tables import Cell, Column, table

RESULTS = "Results"
FINGERPRINT = "weights"  # a sum over all weights, which identifies equal runs and is not tested
OWN = ("metric", "value", "step", "label", "seed", "timing")
APART = ("units", "seconds", "unit_seconds", "grid", "version", "workers", "threads_per_worker", "jobs")
"""Keys of a manifest that describe the course of a run, which two equal runs need not share."""
OF_UNITS = {"seconds": ("seconds of a unit, s", 1.0), "peak_memory": ("peak memory of a unit, MiB", 2.0**20)}
LONGEST = 160

Values = dict[tuple[str, str], dict[int, float]]
"""By series (a metric with the further keys of its records) and label: values by seed."""


def difference(a: Path, b: Path, metrics: Sequence[str] = ()) -> str:
    """`between` what two results folders or published files hold."""
    return between((a, read_results(a)), (b, read_results(b)), metrics)


def between(a: tuple[Path, Results], b: tuple[Path, Results], metrics: Sequence[str] = ()) -> str:
    """Markdown that compares two results, given with their places, each label with itself.

    `metrics` are those to compare, by their final values; by default all without steps, or all where there are none,
    but for the fingerprint of the weights.
    Raises UsageError for a metric that neither has.
    """
    both = before, after = tuple(results.in_plain_text() for _, results in (a, b))
    rows = [row for results in both for row in results.rows]
    known = dict.fromkeys(row["metric"] for row in rows)
    for name in metrics:
        if name not in known:
            raise UsageError(unknown("metric", name, known))
    plain = dict.fromkeys(row["metric"] for row in rows if row["step"] is None and row["metric"] != FINGERPRINT)
    ours, theirs = (_finals(results, metrics or list(plain or known)) for results in both)
    changes: dict[str, dict[str, Comparison]] = {}
    for series, label in ours:
        if (series, label) in theirs:
            found = compared(ours[series, label], theirs[series, label])
            changes.setdefault(series, {})[label] = found
    timings = {_series(row) for row in rows if row.get("timing") or is_timing(row["metric"])}
    timings |= {series for series, _ in OF_UNITS.values()}
    described = [
        f"- {name}: {code(str(path))}, {results.manifest.get('experiment', '?')}, {len(results.headers)} units"
        + (f" ({results.missing} missing)" if results.missing else "")
        for name, path, results in zip("AB", (a[0], b[0]), both)
    ]
    sections = [
        "# What changed from A to B",
        "\n".join(described),
        environment(before, after),
        coverage(before, after),
        _section(RESULTS, {series: found for series, found in changes.items() if series not in timings}),
        _section("Timings", {series: found for series, found in changes.items() if series in timings}),
    ]
    return "\n\n".join(section for section in sections if section)


def _series(row: Row) -> str:
    extra = ", ".join(f"{k}: {v}" for k, v in row.items() if k not in OWN and isinstance(v, str | int | float))
    return f"{row['metric']} ({extra})" if extra else row["metric"]


def _finals(results: Results, metrics: Sequence[str]) -> Values:
    """The last value of each series, label and seed; and time and memory of whole units as further series."""
    finals: Values = {}
    for metric in metrics:
        for row in sorted(results.select(metric), key=last_step):
            finals.setdefault((_series(row), row["label"]), {})[row["seed"]] = row["value"]
    for key, (name, scale) in OF_UNITS.items():
        for header in results.headers:
            if header.get(key):
                finals.setdefault((name, header["label"]), {})[header["seed"]] = header[key] / scale
    order = {label: place for place, label in enumerate(results.labels)}
    return dict(sorted(finals.items(), key=lambda item: order[item[0][1]]))


def _section(title: str, changes: Mapping[str, Mapping[str, Comparison]]) -> str:
    """The changes of some series, corrected together: Holm over all their tests."""
    if not changes:
        return f"## {title}\n\nThere is no metric that both have for the same label." if title == RESULTS else ""
    p = corrected({(series, label): change for series, found in changes.items() for label, change in found.items()})
    tests = sum(one is not None for one in p.values())
    blocks, verdicts, equal = [], [], []
    for series, found in changes.items():
        adjusted = [p[series, label] for label in found]
        words = [change.verdict(p) for change, p in zip(found.values(), adjusted)]
        verdicts += words
        if set(words) == {"identical"}:
            equal.append(f"- {series}: {', '.join(found)}")
        else:
            rows = [_row(*row) for row in zip(found, found.values(), adjusted, words)]
            blocks.append(f"### {series}\n\n{table(_columns(found.values()), rows)}")
    if equal:
        blocks.append("### Identical in every seed\n\n" + "\n".join(equal))
    counts = ", ".join(f"{count} {name.strip('*')}" for name, count in Counter(verdicts).items())
    method = (
        f"{len(verdicts)} comparisons: {counts}. Mean ± standard deviation over seeds. Tests: the paired t-test over "
        "shared seeds, Welch's where fewer than two are shared, none of fewer than three seeds or of a difference "
        f"that is the same in all; p is corrected for the {tests} tests of this section (Holm 1979) and beyond "
        f"noise below {LEVEL}. Effect: the difference in standard deviations, of the differences (paired) or of the "
        "root mean of both variances (Welch)."
    )
    return "\n\n".join([f"## {title}", method, *blocks])


def _columns(found: Collection[Comparison]) -> list[Column]:
    """The columns, with about four digits of the largest mean."""
    means = [abs(mean) for change in found for mean in (change.a.mean, change.b.mean) if isfinite(mean) and mean]
    largest = max(means, default=1.0)
    decimals = 1 if largest >= 100 else 2 if largest >= 10 else 4 if largest >= 0.01 else 7
    digits = {"A": decimals, "B": decimals, "effect": 2}
    titles = ("label", "A", "B", "B − A", "effect", "test", "p", "p, Holm", "verdict")
    return [Column(title, digits.get(title, 3)) for title in titles]


def _row(label: str, found: Comparison, adjusted: float | None, verdict: str) -> list[Cell]:
    n = f"n = {found.a.n}" if found.a.n == found.b.n else f"n = {found.a.n} and {found.b.n}"
    test = n if found.p is None else f"{found.name}, {n}"
    written = ["–" if p is None else f"{p:.2g}" for p in (found.p, adjusted)]
    return [label, found.a, found.b, f"{found.difference:+.3g}", found.effect, test, *written, verdict]


def environment(a: Results, b: Results) -> str:
    """A section on options, versions, commits and machines that differ."""
    before, after = (_flat({k: v for k, v in r.manifest.items() if k not in APART}) for r in (a, b))
    before["commit of the units"], after["commit of the units"] = (
        ", ".join(sorted({str(header.get("commit"))[:12] for header in results.headers})) for results in (a, b)
    )
    lines = [f"- {line}" for line in _changed(before, after)]
    if not lines:
        return "## Environment\n\nThe same command, options, commit, versions and machine."
    return "## Environment\n\nWhat is not listed is the same.\n\n" + "\n".join(lines)


def coverage(a: Results, b: Results) -> str:
    """A section on units of one side only, and on labels whose configurations differ."""
    lines = []
    ours, theirs = ({(header["label"], header["seed"]) for header in results.headers} for results in (a, b))
    for name, results, alone in (("A", a, ours - theirs), ("B", b, theirs - ours)):
        for label in results.labels:
            if seeds := [str(seed) for own, seed in sorted(alone) if own == label]:
                lines.append(f"- only in {name}: {label}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}")
    for label in a.labels:
        if (one := a.config(label)) and (other := b.config(label)):
            lines += [f"- {label}: {line}" for line in _changed(_flat(one), _flat(other), "`")]
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
    return "–" if value is None else code(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")
