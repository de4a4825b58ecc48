"""The tables of the claims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from benchmarks.experiments.claims.course import ACCURACY, LOOKS
from benchmarks.experiments.claims.experiment import (
    EXACT,
    GRIDS,
    LOOKED_AT,
    NAIVE,
    OF_WHOLE,
    TUNED,
    WHOLE,
)
from benchmarks.harness.significance import compared, corrected
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

PAIRS = (
    (EXACT, NAIVE),
    ("reversal", EXACT),
    ("reversal of mini-batches", "mini-batch squares"),
    ("public EWC-DR", "public EWC"),
    ("public EWC-DR" + TUNED, "public EWC" + TUNED),
    ("public EWC-DR" + TUNED, "uniform"),
    ("variational", EXACT),
    ("uniform", EXACT),
    *((name + OF_WHOLE, name) for name in WHOLE),
    ("mini-batch squares" + OF_WHOLE, NAIVE),
)
SETTING = """\
{train} images of each class, {steps} steps of Adam at {rate:g} with batches of {batch} a task, a new Adam for each.
Mean ± standard deviation over n seeds of the accuracy at the end. λ was chosen on seed 1000, on images held out of
training, for each row and each question. *against exact* is the difference to the exact Fisher, seed by seed, with p of
a paired t-test after Holm's correction within the table."""
VANISH = """\
During the first task without a penalty: the geometric mean over seeds of the trace of each diagonal and, in brackets,
the mean cosine between its diagonal and that of the exact Fisher. A factor that all entries share is part of λ."""
TRACES = """\
Of each kind in its own run: the trace of the diagonal of each task at its end, geometric means over seeds. *confidence*
is the mean probability of the observed class of a training image of task 2 among the outputs that its importance
compares: the task's own, but all known ones in the public code. *cut* is the part of the entries above 0 of task 1 that
the public code cuts at 1e-4."""


def report(results: Results, out: Path) -> str:
    """Markdown, from whatever has finished."""
    if results.tuning:
        return "\n\n".join(["# The strengths that are tried, on images held out", _tried(results)])
    setting = results.config(next(iter(results.columns)))["setting"]
    parts = ["# What survives an exact Fisher and a fair λ", SETTING.format_map(setting)]
    for part, some in results.by("part"):
        for measure in ACCURACY[some.first["scenario"]]:
            found = dict(_shown(some, measure))
            if found:
                parts += [f"## {part}: among {measure}", _table(found, measure)]
    parts += ["## The differences that were claimed", _pairs(results), _ends(results)]
    parts += ["## Whether the Fisher vanishes", VANISH]
    parts += [text for part, some in results.by("part") for text in (f"### {part}, first task", _looks(some))]
    parts += ["## Traces of all tasks", TRACES]
    parts += [text for part, some in results.by("part") for text in (f"### {part}, each task", _traces(some))]
    return "\n\n".join(text for text in parts if text)


def _shown(results: Results, measure: str) -> Iterator[tuple[str, Results]]:
    """By row: the strength chosen for a measure."""
    for one in results.each():
        if measure in one.first["chosen"] and one.final(measure) is not None:
            yield one.first["row"], one


def _table(found: dict[str, Results], measure: str) -> str:
    tests = {}
    if EXACT in found:
        exact = found[EXACT].finals(measure)
        tests = {row: compared(exact, one.finals(measure)) for row, one in found.items() if row != EXACT}
    found_p = corrected(tests)
    rows: list[list[Cell]] = []
    for row, one in found.items():
        accuracy, test, p = one.final(measure), tests.get(row), found_p.get(row)
        strength = f"{one.first['strength']:g}" if one.first["strength"] else ""
        rows.append([
            row, accuracy, f"{test.difference:+.3f}" if test else None,
            None if p is None else f"{p:.2g}",
            strength, accuracy.n if accuracy else 0,
        ])  # fmt: skip
    return table([Column("importance"), Column("accuracy", 3), *map(Column, ("against exact", "p", "λ", "n"))], rows)


def _pairs(results: Results) -> str:
    tests = {}
    for part, some in results.by("part"):
        for measure in ACCURACY[some.first["scenario"]]:
            found = dict(_shown(some, measure))
            for ours, theirs in PAIRS:
                if ours in found and theirs in found:
                    a, b = (found[row].finals(measure) for row in (theirs, ours))
                    tests[f"{ours} less {theirs}", f"{part}: {measure}"] = compared(a, b)
    p = corrected(tests)
    places = list(dict.fromkeys(place for _, place in tests))
    rows: list[list[Cell]] = []
    for pair in dict.fromkeys(pair for pair, _ in tests):
        cells: list[Cell] = []
        for place in places:
            test, value = tests.get((pair, place)), p.get((pair, place))
            said = "–" if value is None else f"{value:.2g}"
            cells.append(f"{test.difference:+.3f} ({said})" if test else None)
        rows.append([pair, *cells])
    text = "Differences of accuracy, with p after Holm's correction within this table."
    return f"{text}\n\n{table([Column('difference'), *map(Column, places)], rows)}"


def _ends(results: Results) -> str:
    """The rows whose strength is an end of what was tried."""
    ends = []
    for one in results.each():
        row = one.first
        grid = GRIDS.get(row["row"].removesuffix(OF_WHOLE).removesuffix(TUNED), ())
        tuned = row["row"].endswith(TUNED) or not row["row"].startswith("public")
        if tuned and grid and row["strength"] in (grid[0], grid[-1]):
            ends.append(one.label)
    return f"λ at an end of what was tried: {'; '.join(ends)}." if ends else "No λ is at an end of what was tried."


def _looks(results: Results) -> str:
    naive = results.where(row=NAIVE)
    if not naive.columns:
        return ""
    rows: list[list[Cell]] = []
    for step in LOOKS:
        confidence = naive.final("look/confidence", step=step)
        if confidence is None:
            continue
        cells: list[Cell] = [str(step), f"{confidence.mean:.5f}"]
        for kind in LOOKED_AT:
            values = naive.finals("look/trace", step=step, kind=kind).values()
            cosine = None if kind == EXACT else naive.final("look/cosine", step=step, kind=kind)
            cells.append(_power(values) + (f" ({cosine.mean:.2f})" if cosine else ""))
        rows.append(cells)
    return table([Column("steps"), Column("confidence"), *map(Column, LOOKED_AT)], rows)


def _traces(results: Results) -> str:
    setting = results.config(next(iter(results.columns)))["setting"]
    steps = range(1, len(setting["tasks"]))
    found = dict(_shown(results, ACCURACY[setting["scenario"]][-1]))
    rows: list[list[Cell]] = []
    for row, one in found.items():
        values = [one.finals("trace", step=step).values() for step in steps]
        sure, cut = one.final("confidence", step=2), one.final("cut", step=1)
        if sure is not None and (all(values) or row == NAIVE):
            traces = map(_power, values) if all(values) else [None for _ in steps]
            rows.append([row, *traces, f"{sure.mean:.4f}", None if cut is None else f"{cut.mean:.2f}"])
    titles = *(f"task {step}" for step in steps), "confidence", "cut"
    return table([Column("importance"), *map(Column, titles)], rows)


def _tried(results: Results) -> str:
    rows: list[list[Cell]] = []
    for (part, row), some in results.by("part", "row"):
        for measure in some.first["chosen"]:
            tried = [(one.first["strength"], one.final(measure)) for one in some.each()]
            texts = [f"{strength:g}: {found.mean:.3f}" for strength, found in tried if found]
            rows.append([f"{part}, {row}", measure, ", ".join(texts)])
    return table([Column("row"), Column("question"), Column("accuracy by λ")], rows)


def _power(values: Iterable[float]) -> str:
    """The geometric mean of those above 0."""
    known = [value for value in values if value > 0]
    return f"{geometric_mean(known):.2g}" if known else "0"
