"""The tables of the three sources of error, and what they say beyond noise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import paired

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

Key = tuple[str, str, str, str]
"""Trajectory, policy, kind, structure."""

EXPLANATION = """The stream, model and training of `refresh` (nine slices of a sine boundary, 502 parameters). Every
picture is estimated on the same tenth of each task's examples, and measured every 10 steps from the second task on;
mean ± standard deviation over n seeds:

- **κ**, that of the research log: the mean over stored examples of |ℓ(x, θ) − ℓ(x, a) − increase(x)| with the curvature
  of x alone, restricted to the structure (of batches of 5 for the squared batch gradient). One example's curvature has
  rank one here, so that low rank is dense.
- **error**: |L(θ) − L(a) − increase(θ)| / t of the picture that training adds, the sum over t past tasks.

The linear term enters where the policy keeps it (*slope*, *adaptive*). Trajectories: *sequential* adds nothing to the
loss, *replay* the loss of the stored examples themselves, *regularised* the picture of the row, with λ = 1 (5 for the
batched form). The exact Fisher is the GGN here. Measured Hessians are exact; those that training adds are clipped."""


def report(results: Results, out: Path) -> str:
    parts = [
        "# Three sources of error",
        EXPLANATION,
        "## How stale, and which curvature: κ",
        *(_crossed(results, "kappa", trajectory) for trajectory in ("sequential", "replay")),
        "## The same for the picture as a sum: error",
        *(_crossed(results, "error", trajectory) for trajectory in ("sequential", "replay")),
        "## Which trajectory",
        _trajectories(results),
        "## What the differences are worth",
        _claims(results),
    ]
    return "\n\n".join(parts)


def values(results: Results, metric: str, key: Key) -> dict[int, float]:
    """The value of each seed."""
    trajectory, policy, kind, structure = key
    label = trajectory if trajectory != "regularised" else f"regularised by {policy}, {kind}, {structure}"
    rows = results.select(metric, label, policy=policy, kind=kind, structure=structure)
    return {row["seed"]: row["value"] for row in rows}


def _axes(results: Results) -> tuple[list[str], list[str], list[str]]:
    """Policies, kinds and structures, in the order of the grid."""
    rows = results.select("error")
    return tuple(list(dict.fromkeys(row[name] for row in rows)) for name in ("policy", "kind", "structure"))  # type: ignore[return-value]


def _crossed(results: Results, metric: str, trajectory: str) -> str:
    policies, kinds, structures = _axes(results)
    rows: list[list[Cell]] = []
    for structure in structures:
        for policy in policies:
            cells = [
                results.final(metric, trajectory, policy=policy, kind=kind, structure=structure) for kind in kinds
            ]
            if any(cells):
                rows.append([f"{structure}, {policy}", *cells, max(cell.n for cell in cells if cell)])
    columns = [Column(f"{trajectory} trajectory"), *(Column(kind) for kind in kinds), Column("n")]
    return table(columns, rows)


def _trajectories(results: Results) -> str:
    """κ of one picture on the three trajectories, and what training with it reaches."""
    policies, kinds, structures = _axes(results)
    rows: list[list[Cell]] = []
    for policy, kind, structure in ((p, k, s) for k in kinds for s in structures for p in policies):
        label = f"regularised by {policy}, {kind}, {structure}"
        metric = "error" if structure == "low rank" else "kappa"
        own = results.final(metric, label)
        if own:
            names = {"policy": policy, "kind": kind, "structure": structure}
            measured = [results.final(metric, trajectory, **names) for trajectory in ("sequential", "replay")]
            counted = results.final("refreshes", label)
            rows.append([f"{kind}, {structure}, {policy}", *measured, own, results.final("accuracy", label),
                         counted and counted.mean, own.n])
    reached = ", ".join(
        f"{name} {found.mean:.3f} ± {found.std or 0:.3f}"
        for name, found in ((name, results.final("accuracy", name)) for name in ("sequential", "replay"))
        if found
    )
    columns = [
        Column("picture"), Column("κ sequential"), Column("κ replay"), Column("κ regularised by it"),
        Column("accuracy regularised", 3), Column("refreshes a task", 1), Column("n"),
    ]
    return f"Accuracy on all tasks without any picture: {reached}. Rows of low rank give the error.\n\n" + table(
        columns, rows
    )


def _claims(results: Results) -> str:
    """How many of the differences hold in the mean, and how many beyond noise."""
    policies, kinds, structures = _axes(results)
    columns = [
        Column("claim"), Column("of"), Column("holds in the mean"), Column("beyond noise"),
        Column("reversed beyond noise"), Column("where reversed"),
    ]
    rows: list[list[Cell]] = []
    for metric, symbol in (("kappa", "κ"), ("error", "error")):
        for trajectory in ("sequential", "replay"):
            def cells(policy: str, trajectory: str = trajectory) -> list[Key]:
                return [(trajectory, policy, kind, structure) for kind in kinds for structure in structures]

            pairs = {
                "refresh below accumulate": zip(cells("refresh"), cells("accumulate")),
                "refresh below merge": zip(cells("refresh"), cells("merge")),
                "slope below none": zip(cells("refresh, slope"), cells("refresh")),
                "adaptive below slope": zip(cells("adaptive"), cells("refresh, slope")),
            }
            rows += [
                [f"{symbol}, {trajectory}: {claim}", *_counted(results, metric, found)]
                for claim, found in pairs.items()
            ]
        all_cells = [(p, k, s) for p in policies for k in kinds for s in structures]
        for other in ("sequential", "regularised"):
            found = (((("replay", *cell), (other, *cell))) for cell in all_cells)
            rows.append([f"{symbol}: replay below {other}", *_counted(results, metric, found)])
        for kind in kinds:
            if kind != "GGN":
                cell_pairs = (
                    (("sequential", p, kind, s), ("sequential", p, "GGN", s)) for p in policies for s in structures
                )
                rows.append([f"{symbol}, sequential: {kind} below GGN", *_counted(results, metric, cell_pairs)])
    return (
        "Differences over the same seeds; beyond noise is p < 0.05 in a two-sided paired t-test, uncorrected for their "
        "number. What is neither is within noise.\n\n" + table(columns, rows)
    )


def _counted(results: Results, metric: str, pairs: Iterable[tuple[Key, Key]]) -> list[Cell]:
    """Of the pairs (smaller, larger) that were measured: how many, as claimed, as claimed beyond noise, reversed."""
    total = held = sure = 0
    reversed_: list[str] = []
    for smaller, larger in pairs:
        pair = paired(values(results, metric, smaller), values(results, metric, larger))
        if pair is None:
            continue
        total, held = total + 1, held + (pair.difference.mean < 0)
        beyond = pair.verdict == "beyond noise"
        sure += beyond and pair.difference.mean < 0
        if beyond and pair.difference.mean > 0:
            reversed_.append(", ".join(smaller[1:]))
    shown = "; ".join(reversed_[:4]) + (" …" if len(reversed_) > 4 else "")
    return [total, held, sure, len(reversed_), shown or "–"]
