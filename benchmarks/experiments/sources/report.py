"""The tables of the three sources of error, and what they say beyond noise."""

from __future__ import annotations

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
  of x alone, restricted to the structure (of batches of 5 for the squared batch gradient). But for the Hessian that of
  one example has a rank of one with two classes, so that low rank is dense; of the Hessian it is not measured.
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
        "Differences over the same seeds; ≈ marks those within noise, p ≥ 0.05 in a two-sided paired t-test, "
        "uncorrected for their number.",
        _differences(results, "kappa"),
        _in_words(results, "kappa"),
        _kinds(results, "kappa"),
        _differences(results, "error"),
        _in_words(results, "error"),
        _kinds(results, "error"),
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
        own = results.final("kappa", label)
        if own:
            names = {"policy": policy, "kind": kind, "structure": structure}
            measured = [results.final("kappa", trajectory, **names) for trajectory in ("sequential", "replay")]
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
    return f"Accuracy on all tasks without any picture: {reached}.\n\n" + table(columns, rows)


COMPARED: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "refresh less accumulate, sequential": (("sequential", "refresh"), ("sequential", "accumulate")),
    "refresh less accumulate, replay": (("replay", "refresh"), ("replay", "accumulate")),
    "refresh less merge, sequential": (("sequential", "refresh"), ("sequential", "merge")),
    "slope less none, sequential": (("sequential", "refresh, slope"), ("sequential", "refresh")),
    "adaptive less slope, sequential": (("sequential", "adaptive"), ("sequential", "refresh, slope")),
    "replay less sequential, accumulate": (("replay", "accumulate"), ("sequential", "accumulate")),
    "replay less sequential, refresh": (("replay", "refresh"), ("sequential", "refresh")),
    "replay less regularised, accumulate": (("replay", "accumulate"), ("regularised", "accumulate")),
    "replay less regularised, refresh": (("replay", "refresh"), ("regularised", "refresh")),
    "replay less regularised, adaptive": (("replay", "adaptive"), ("regularised", "adaptive")),
}
"""Title, and (trajectory, policy) of what is compared with what."""


def _differences(results: Results, metric: str) -> str:
    """Each comparison for every structure and kind."""
    _, kinds, structures = _axes(results)
    rows: list[list[Cell]] = []
    for title, (smaller, larger) in COMPARED.items():
        for structure in structures:
            cells = [difference(results, metric, (*smaller, k, structure), (*larger, k, structure)) for k in kinds]
            if any(cell != "–" for cell in cells):
                rows.append([f"{title}, {structure}", *cells])
    return table([Column(metric), *(Column(kind) for kind in kinds)], rows)


def _kinds(results: Results, metric: str) -> str:
    """Each kind less the GGN along sequential training, for every policy and structure."""
    policies, kinds, structures = _axes(results)
    others = [kind for kind in kinds if kind != "GGN"]
    rows: list[list[Cell]] = []
    for structure in structures:
        for policy in policies:
            key = ("sequential", policy, "GGN", structure)
            cells = [difference(results, metric, ("sequential", policy, k, structure), key) for k in others]
            rows.append([f"{structure}, {policy}", *cells])
    return table([Column(f"{metric} less that of the GGN, sequential"), *(Column(kind) for kind in others)], rows)


def difference(results: Results, metric: str, smaller: Key, larger: Key) -> str:
    """The mean difference over seeds, with ≈ where it is within noise."""
    pair = paired(values(results, metric, smaller), values(results, metric, larger))
    if pair is None:
        return "–"
    mark = {"beyond noise": "", "within noise": " ≈"}.get(pair.verdict, f" ({pair.verdict})")
    return f"{pair.difference.mean:+.3f}{mark}"


def _in_words(results: Results, metric: str) -> str:
    """How many cells of each comparison are below zero, within noise, and above it beyond noise."""
    _, kinds, structures = _axes(results)
    lines = []
    for title, (smaller, larger) in COMPARED.items():
        pairs = [
            paired(values(results, metric, (*smaller, k, s)), values(results, metric, (*larger, k, s)))
            for k in kinds for s in structures
        ]
        known = [pair for pair in pairs if pair is not None]
        below = sum(pair.difference.mean < 0 for pair in known)
        sure = sum(pair.difference.mean < 0 and pair.verdict == "beyond noise" for pair in known)
        above = sum(pair.difference.mean > 0 and pair.verdict == "beyond noise" for pair in known)
        if known:
            lines.append(f"- {title}: below zero in {below} of {len(known)} cells, {sure} beyond noise; above zero "
                         f"beyond noise in {above}.")
    return "\n".join(lines)
