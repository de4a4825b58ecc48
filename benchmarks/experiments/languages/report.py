"""The tables and the figure of the languages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.languages.experiment import AT_ONCE, FORKS, NAIVE, SAMPLED, TRAINED, methods
from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.significance import compared, holm
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results

BITS = "mean_bits"
MATTER = NAIVE, AT_ONCE, "Replay of 16 KiB", "L2", FORKS, *SAMPLED[::2]
SETTING = """A GPT of {layers} blocks of width {width} on windows of {context} bytes learns {languages} in turn: \
{first_steps:,} steps on the first, {steps:,} on each other, with batches of {batch}, Adam at {first_rate:g} and then \
{rate:g}. All methods of a seed go on from the same model of the first language. Bits per byte, of text in no training \
part: mean ± standard deviation over n seeds of the mean over all languages at the end, of that over each just after \
it, and of the rise in between; then of each language at the end. λ was chosen on seed 1000, on text held out for it."""
VERDICT = """*less {baseline}* is the difference seed by seed, p that of the two-sided paired t-test after Holm's \
correction for the number of rows, none below three seeds; the verdict is at 5 %. *kept* is beside the model, at the \
end, *s* the seconds of training and of estimates after the first language."""


def report(results: Results, out: Path) -> str:
    """Markdown: for all weights and for adapters a table, the course of the rows that matter, and a figure."""
    lines = ["# A small GPT learns languages in turn"]
    names = languages(results)
    lines.append(SETTING.format(**results.first, languages=", ".join(names)))
    if results.manifest.get("options", {}).get("tuning"):
        return "\n\n".join([*lines, "The strengths that are tried.", _table(results, names)[0]])
    lines += [f"{_texts(results)} {VERDICT.format(baseline=FORKS)}"]
    for part, own in results.by("part"):
        size = next(iter(own.finals("parameters", own.labels[0]).values()), 0)
        lines += [f"## {part[0].upper()}{part[1:]}", f"{size:,.0f} parameters are trained.", *_table(own, names)]
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


def _table(results: Results, names: list[str]) -> tuple[str, str]:
    """The table, and the rows whose strength is an end of what was tried."""
    tuning = results.manifest.get("options", {}).get("tuning")
    tests = {} if tuning else _tests(results)
    titles = [f"less {FORKS}", "p (Holm)", "verdict"]
    columns = [
        Column("method"), Column("bits", 3, min), Column("when learned", 3), Column("forgetting", 3),
        *(Column(name, 2) for name in names), *(Column(title, 3) for title in titles if tests), Column("λ"),
        Column("kept KiB", 0), Column("s", 1), Column("n"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    ends, grids = [], methods(1, False)
    for one in results.each():
        setting, found = one.first, [one.final(metric) for metric in (BITS, "learned", "forgetting")]
        grid, strength = grids[setting["row"]].grid, setting["strength"]
        name = one.label if tuning else setting["row"]
        if setting["row"] == AT_ONCE:
            found[2] = None
        if grid and strength in (grid[0], grid[-1]):
            ends.append(name)
        kept, seconds = one.final("kept_bytes"), one.final("seconds")
        rows.append([
            name, *found, *(one.final(f"bits/{language}") for language in names),
            *(tests.get(one.label, ("", "", "")) if tests else ()), f"{strength:g}" if grid else "",
            kept and kept.mean / 1024, seconds and seconds.mean, found[0].n if found[0] else 0,
        ])  # fmt: skip
    said = f"λ at an end of what was tried, so perhaps better beyond it: {'; '.join(ends)}."
    return table(columns, rows), said if ends and not tuning else ""


def _tests(results: Results) -> dict[str, tuple[Cell, Cell, Cell]]:
    """By label, but that of the baseline: the difference from it, p and the verdict."""
    values = {one.label: one.finals(BITS) for one in results.each()}
    baseline = next((values.pop(one.label) for one in results.where(row=FORKS).each()), None)
    found = {label: compared(baseline, own) for label, own in values.items() if own} if baseline else {}
    tested = {label: test.p for label, test in found.items() if test.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values()))))

    def cells(label: str) -> tuple[Cell, Cell, Cell]:
        p = corrected.get(label)
        return found[label].difference, "" if p is None else f"{p:.2g}", found[label].verdict(p)

    return {label: cells(label) for label in found}


def _course(results: Results, names: list[str]) -> str:
    """The matrix of each row that matters, all weights trained: bits on every language after each."""
    rows: list[list[Cell]] = []
    for one in _shown(results):
        curves = {name: dict(one.curve(f"bits/{name}")) for name in names}
        for number, step in enumerate(sorted({step for curve in curves.values() for step in curve})):
            after = names[int(step) - 1]
            title = f"{one.first['row']}, after {after}"
            rows.append([title if number else f"{title}", *(curves[name].get(step) for name in names)])
    return table([Column("all weights"), *(Column(name, 2) for name in names)], rows)


def _shown(results: Results) -> list[Results]:
    return list(results.where(part=TRAINED[0].name, row=lambda row: row in MATTER).each())


def _figure(results: Results, names: list[str], out: Path) -> str:
    shown = _shown(results)
    metrics = {f"bits/{names[0]}": f"bits per byte of {names[0]}", "bits/seen": "mean over languages seen"}
    panels = [
        Curves({one.first["row"]: one.curve(metric) for one in shown}, title) for metric, title in metrics.items()
    ]
    labels = [one.first["row"] for one in shown]
    plot_curves(out / "languages.png", panels, xlabel="languages learned", labels=labels, matter=labels)
    return "![Bits per byte of the first language and of those seen](languages.png)"
