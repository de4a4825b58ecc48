"""The tables and the figure of the languages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.languages.experiment import (
    AT_ONCE,
    BASELINES,
    FORKS,
    LESS_REPLAY,
    NAIVE,
    REPLAY,
    SAMPLED,
    TRAINED,
    WEIGHTS,
)
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.significance import Comparison, compared, corrected
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import mean_ratio

if TYPE_CHECKING:
    from benchmarks.harness import Results

BITS = "mean_bits"
MATTER = NAIVE, AT_ONCE, LESS_REPLAY, REPLAY, WEIGHTS, FORKS, SAMPLED[1]
IN_FULL = NAIVE, REPLAY, FORKS, SAMPLED[1]
SETTING = """A GPT of {layers} blocks of width {width} on windows of {context} bytes learns {languages} in turn: \
{first_steps:,} steps on the first, {steps:,} on each other, with batches of {batch}, Adam at {rate:g} on the first. \
All methods of a seed go on from the same model of the first language. Bits per byte, of text in no training part, \
mean ± standard deviation over n seeds."""
COLUMNS = """*bits* is the mean over all languages at the end, *when learned* over each just after it, *forgetting* \
the rise in between; then each language at the end. λ was chosen on seed 1000, on text held out for it. *kept* is what \
the method has beside the model at the end, *time* the CPU time of training and estimates after the first \
language, in times of Naive's in the same seed, of runs side by side."""
TESTS = """The difference in *bits* seed by seed, and p of the two-sided paired t-test after Holm's correction for the \
number of rows, none below three seeds; beyond noise at 5 %. Negative is better."""


def report(results: Results, out: Path) -> str:
    """Markdown: for all weights and for adapters a table and its tests, then the course of a few rows, and a figure."""
    names = languages(results)
    lines = ["# A small GPT learns languages in turn", SETTING.format(**results.first, languages=", ".join(names))]
    if results.tuning:
        return "\n\n".join([*lines, "The strengths that are tried.", _table(results, names)])
    lines += [_texts(results), COLUMNS]
    for part, own in results.by("part"):
        size, first = next(iter(own.finals("parameters", own.labels[0]).values()), 0), own.first
        rate = first["rate"] * first["slower"]
        said = f"{size:,.0f} parameters are trained, Adam at {rate:g} after the first language."
        lines += [f"## {part[0].upper()}{part[1:]}", said, _table(own, names), _on_ends(own)]
        lines += [f"### {part[0].upper()}{part[1:]}: what is beyond noise", _tests(own)]
    lines += ["## After each language", _course(results, names), _figure(results, names, out)]
    return "\n\n".join(line for line in lines if line)


def languages(results: Results) -> list[str]:
    """In the order in which they are learned."""
    found = (metric.partition("/")[2] for metric in results.metrics if metric.startswith("bits/"))
    return [name for name in found if name != "seen"]


def _texts(results: Results) -> str:
    found = {
        row["row"]: f"{row['value']:,.0f} bytes of {row['row']} ({row['digest']})" for row in results.select("bytes")
    }
    return f"Trained on {', '.join(found.values())}: other releases of Python and torch have other text."


def _table(results: Results, names: list[str]) -> str:
    columns = [
        Column("method"), Column("bits", 3, min), Column("forgetting", 3), Column("when learned", 3),
        *(Column(name, 2) for name in names), Column("λ"), Column("kept KiB", 0), Column("time", 2), Column("n"),
    ]  # fmt: skip
    naive = next((one.finals("seconds") for one in results.where(row=NAIVE).each()), {})
    rows: list[list[Cell]] = []
    for one in results.each():
        setting, (bits, forgetting, learned) = one.first, map(one.final, (BITS, "forgetting", "learned"))
        kept = one.final("kept_bytes")
        rows.append([
            one.label if results.tuning else setting["row"], bits,
            None if setting["row"] == AT_ONCE else forgetting, learned, *(one.final(f"bits/{name}") for name in names),
            f"{setting['strength']:g}" if _grid(setting) else "",
            kept and kept.mean / 1024, mean_ratio(one.finals("seconds"), naive), bits.n if bits else 0,
        ])  # fmt: skip
    return table(columns, rows)


def _grid(setting: dict[str, Any]) -> tuple[float, ...]:
    """The strengths that tuning tries for a row."""
    return next(one.methods(1, False)[setting["row"]].grid for one in TRAINED if one.name == setting["part"])


def _on_ends(results: Results) -> str:
    """The rows whose strength is an end of what was tried."""
    rows = (one.first for one in results.each())
    found = [row["row"] for row in rows if row["strength"] in (_grid(row)[:1] + _grid(row)[-1:])]
    return f"λ at an end of what was tried, so perhaps better beyond it: {'; '.join(found)}." if found else ""


def _tests(results: Results) -> str:
    """Each row against each baseline."""
    values = {one.first["row"]: one.finals(BITS) for one in results.each()}
    found = {row: _against(values[row], values, row) for row in BASELINES if row in values}
    columns = [Column("method")]
    for row in found:
        columns += [Column(f"less {row}", 3), Column("verdict")]
    rows = [[row, *(cell for tests in found.values() for cell in tests.get(row, ("", "")))] for row in values]
    return f"{table(columns, rows)}\n\n{TESTS}"


def _against(
    baseline: dict[int, float], values: dict[str, dict[int, float]], name: str
) -> dict[str, tuple[Cell, Cell]]:
    """By row, but that of the baseline: the difference from it, and the verdict with p."""
    found = {row: compared(baseline, own) for row, own in values.items() if own and row != name}

    def verdict(test: Comparison, p: float | None) -> str:
        return test.verdict(p) if p is None else f"{test.verdict(p)} ({p:.2g})"

    return {row: (found[row].difference, verdict(found[row], p)) for row, p in corrected(found).items()}


def _course(results: Results, names: list[str]) -> str:
    """Bits on every language after each, of a few rows, all weights trained."""
    rows: list[list[Cell]] = []
    for one in results.where(part=TRAINED[0].name, row=lambda row: row in IN_FULL).each():
        curves = {name: dict(one.curve(f"bits/{name}")) for name in names}
        for step in sorted({step for curve in curves.values() for step in curve}):
            after = names[int(step) - 1]
            rows.append([f"{one.first['row']}, after {after}", *(curves[name].get(step) for name in names)])
    return table([Column("all weights"), *(Column(name, 2) for name in names)], rows)


def _figure(results: Results, names: list[str], out: Path) -> str:
    """All weights trained: the first language, and the mean over those seen."""
    shown = list(results.where(part=TRAINED[0].name).each())
    metrics = {f"bits/{names[0]}": f"bits per byte of {names[0]}", "bits/seen": "of all languages seen, mean"}
    panels = [
        Curves({one.first["row"]: one.curve(metric) for one in shown}, title) for metric, title in metrics.items()
    ]
    labels = [one.first["row"] for one in shown]
    plot_curves(out / "languages.png", panels, xlabel="languages learned", labels=labels, matter=MATTER)
    return "![Bits per byte of the first language and of those seen](languages.png)"
