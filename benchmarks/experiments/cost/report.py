"""The tables of prices and errors, one for each model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.harness.tables import Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

BUILD_GOALS = {
    ("MLP 784-400-400-10", "empirical Fisher, diagonal"): 1.1,
    ("MLP 784-400-400-10", "Fisher, diagonal"): 2.3,
    ("MLP 784-400-400-10", "Fisher of one sample, KFAC"): 1.7,
    ("MLP 784-400-400-10", "Fisher, KFAC (type 2)"): 4.0,
    ("MLP 784-400-400-10", "empirical Fisher, top 10"): 15.0,
    ("conv net", "empirical Fisher, diagonal"): 1.5,
}
STEP_GOALS = {
    ("MLP 784-400-400-10", "empirical Fisher, KFAC"): 3.0,
    ("MLP 784-400-400-10", "Fisher of one sample, KFAC"): 3.0,
    ("MLP 784-400-400-10", "Fisher, KFAC (type 2)"): 3.0,
    ("MLP 784-400-400-10", "empirical Fisher, top 10"): 1.6,
}
HEAD = """\
# The price and the accuracy of a curvature

Build: time in epochs of plain gradient passes over the same examples. Step: time of a training step through Avalanche's
loop in steps of Naive, with one or five past experiences. Each is the median over interleaved rounds of ratios to the
reference timed just before, one thread. Held: MiB of the matrix; foreseen: what its structure says beforehand. Error:
‖Ĉ − C‖ / ‖C‖ in the Frobenius norm and trace: tr Ĉ / tr C, for the exact matrix C (of a sampled Fisher: the exact
Fisher) on a small model of the family, trained for 100 steps on 500 digits. Goals are for quiet machines."""


def report(results: Results) -> str:
    """Markdown: a table for each model, then how to get the peers that were not there."""
    parts = [HEAD]
    for label in results.labels:
        if results.config(label):
            parts += [_heading(results, label), _table(results, label)]
    tools = [tool for label in results.labels for tool in results.config(label).get("peers", [])]
    if tools:
        parts.append(f"Peers: {', '.join(sorted({' '.join((t['package'], t['version'])) for t in tools}))}.")
    if missing := sorted({row["package"] for row in results.select("absent")}):
        parts.append(
            f"Not installed, and so not in the tables: {', '.join(missing)}. "
            'To have them: `python -m pip install -e ".[peers]"`.'
        )
    return "\n\n".join(parts)


def _heading(results: Results, label: str) -> str:
    config = results.config(label)
    reference = results.final("build/reference", label, row=config["works"][0]["name"])
    size, small = (results.final("parameters", label, row=row) for row in ("model", "small model"))
    lines = [f"{size.mean:,.0f} parameters" if size else "", f"N = {config['examples']:,}, batch {config['batch']}"]
    if reference:
        lines.append(f"one epoch of gradient passes {reference.mean:.0f} ms")
    if small:
        lines.append(f"errors on {small.mean:,.0f} parameters")
    few = {work["examples"] for work in config["works"]} - {None}
    if few:
        lines.append(f"top 10 and matrix-free from the first {', '.join(f'{n:,}' for n in sorted(few))} examples")
    if config["peers"]:
        seen = min(config["peer_examples"], config["examples"])
        lines.append(f"peers on the first {seen:,} examples, on all where they decompose matrices")
    return f"## {label}\n\n{'; '.join(line for line in lines if line)}; {config['rounds']} rounds."


def _table(results: Results, label: str) -> str:
    config = results.config(label)
    columns = [
        Column("curvature"), Column("build", 2), Column("build goal"), Column("step", 2), Column("step goal"),
        Column("step, 5 past", 2), Column("held", 2), Column("foreseen", 2), Column("error"), Column("trace", 2),
    ]
    names = [*(work["name"] for work in config["works"]), *(tool["title"] for tool in config["peers"])]
    rows = [[name, *_cells(results, label, name)] for name in names]
    reasons = {
        row["row"]: f"{_cut(row['reason'])}."
        for metric in ("failed", "no error") for row in results.select(metric, label)
    }
    return table(columns, rows, footnotes=reasons)


def _cells(results: Results, label: str, name: str) -> list[Any]:
    def value(metric: str) -> Any:
        return results.final(metric, label, row=name)

    held, foreseen = value("bytes/held"), value("bytes/foreseen")
    key = label, name
    return [
        value("build/ratio"),
        _goal(BUILD_GOALS.get(key)),
        value("step1/ratio"),
        _goal(STEP_GOALS.get(key)),
        value("step5/ratio"),
        held and held.mean / 2**20,
        foreseen and foreseen.mean / 2**20,
        value("error"),
        value("trace"),
    ]


def _goal(goal: float | None) -> str:
    return "" if goal is None else f"≤ {goal:g}"


def _cut(reason: str) -> str:
    """The start of an error's message, for below a table."""
    words = " ".join(reason.split()).rstrip(".")
    return words if len(words) <= 160 else f"{words[:158]} …"
