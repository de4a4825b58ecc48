"""The tables of prices and errors, one for each model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.cost.scale_report import scale_report
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
    ("GPT over bytes, windows of 32", "empirical Fisher, diagonal"): 2.0,
    ("GPT over bytes, windows of 32", "Fisher of one sample, KFAC"): 2.5,
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


def report(results: Results, out: Path) -> str:
    """Markdown: a table for each model, then how to get the peers that were not there; of what is scaled see
    `scale_report`."""
    if "keeping" in results.headers[0]["config"]:
        return scale_report(results, out)
    parts = [HEAD]
    for one in results.each():
        parts += [_heading(one), _table(one)]
    tools = {f"{tool['package']} {tool['version']}" for row in results.columns.values() for tool in row["peers"]}
    if tools:
        parts.append(f"Peers: {', '.join(sorted(tools))}.")
    if missing := sorted({row["package"] for row in results.select("absent")}):
        parts.append(
            f"Not installed, and so not in the tables: {', '.join(missing)}. "
            'To have them: `python -m pip install -e ".[peers]"`.'
        )
    return "\n\n".join(parts)


def _heading(results: Results) -> str:
    config = results.first
    epoch, step = (results.final(f"{of}/reference", row=config["works"][0]["name"]) for of in ("build", "step1"))
    size, small = (results.final("parameters", row=row) for row in ("model", "small model"))
    lines = [f"{size.mean:,.0f} parameters" if size else "", f"N = {config['examples']:,}, batch {config['batch']}"]
    if epoch and step:
        lines.append(f"one epoch of gradient passes {epoch.mean:.0f} ms, one step of Naive {step.mean:.1f} ms")
    if small:
        lines.append(f"errors on {small.mean:,.0f} parameters")
    for count in sorted({work["examples"] for work in config["works"]} - {None}):
        names = [work["name"] for work in config["works"] if work["examples"] == count]
        which = names[0] if len(names) == 1 else "top 10 and matrix-free"
        lines.append(f"{which} from the first {count:,} example{'s' if count > 1 else ''}")
    if config["peers"]:
        seen = min(config["peer_examples"], config["examples"])
        lines.append(f"peers on the first {seen:,} examples, on all where they decompose matrices")
    return f"## {results.label}\n\n{'; '.join(line for line in lines if line)}; {config['rounds']} rounds."


def _table(results: Results) -> str:
    columns = [
        Column("curvature"), Column("build", 2), Column("build goal"), Column("step", 2), Column("step goal"),
        Column("step, 5 past", 2), Column("held", 2), Column("foreseen", 2), Column("error"), Column("trace", 2),
    ]  # fmt: skip
    config = results.first
    names = [*(work["name"] for work in config["works"]), *(tool["title"] for tool in config["peers"])]
    reasons = {
        row["row"]: f"{_cut(row['reason'])}." for metric in ("failed", "no error") for row in results.select(metric)
    }
    return table(columns, [[name, *_cells(results, name)] for name in names], footnotes=reasons)


def _cells(results: Results, name: str) -> list[Any]:
    build, one, five, held, foreseen, error, trace = (
        results.final(metric, row=name)
        for metric in ("build/ratio", "step1/ratio", "step5/ratio", "bytes/held", "bytes/foreseen", "error", "trace")
    )
    build_goal, step_goal = (_goal(known.get((results.label, name))) for known in (BUILD_GOALS, STEP_GOALS))
    sizes = (size and size.mean / 2**20 for size in (held, foreseen))
    return [build, build_goal, one, step_goal, five, *sizes, error, trace]


def _goal(goal: float | None) -> str:
    return "" if goal is None else f"≤ {goal:g}"


def _cut(reason: str) -> str:
    """The start of an error's message, for below a table."""
    words = " ".join(reason.split()).rstrip(".")
    return words if len(words) <= 160 else f"{words[:158]} …"
