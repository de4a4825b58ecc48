"""The tables of the three sources of error, and what they say beyond noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Summary, summarise
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import paired

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

NAMES = ("trajectory", "policy", "kind", "structure")
Key = tuple[str, ...]
"""Metric, trajectory, policy, kind and structure; without the last three, what belongs to a whole trajectory."""

EXPLANATION = """The stream, model and training of `refresh` (nine slices of a sine boundary, 502 parameters). Every
quadratic model is estimated on the same tenth of each task's examples, and measured every 10 steps from the second task
on; mean ± standard deviation over n seeds:

- **κ**, that of the research log: the mean over stored examples of |ℓ(x, θ) − ℓ(x, a) − increase(x)| with the curvature
  of x alone, restricted to the structure (of batches of 5 for the squared batch gradient). But for the Hessian that of
  one example has a rank of one with two classes, so that low rank is dense; of the Hessian it is not measured.
- **error**: |L(θ) − L(a) − increase(θ)| / t of the quadratic model that training adds, the sum over t past tasks.

The linear term enters where the policy keeps it (*slope*, *adaptive*). Trajectories: *sequential* adds nothing to the
loss, *replay* the loss of the stored examples themselves, *regularised* the quadratic model of the row, with λ = 1 (5
for the batched form). The exact Fisher is the GGN here. Measured Hessians are exact; those that training adds are
clipped."""

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


@dataclass(frozen=True)
class Measured:
    """The values of each seed by key, and the names that occur, in the order of the grid."""

    values: dict[Key, dict[int, float]]
    policies: list[str]
    kinds: list[str]
    structures: list[str]

    @classmethod
    def of(cls, results: Results) -> Measured:
        values: dict[Key, dict[int, float]] = {}
        for row in results.rows:
            key = (row["metric"], *(row[name] for name in NAMES if name in row))
            values.setdefault(key, {})[row["seed"]] = row["value"]
        models = [row for row in results.rows if row["metric"] == "error"]
        return cls(values, *([*dict.fromkeys(row[name] for row in models)] for name in NAMES[1:]))

    def summary(self, *key: str) -> Summary | None:
        """Mean and standard deviation over seeds; None without values."""
        found = self.values.get(key)
        return summarise(found.values()) if found else None

    def difference(self, smaller: Key, larger: Key) -> str:
        """The mean difference over seeds, with ≈ where it is within noise."""
        pair = paired(self.values.get(smaller, {}), self.values.get(larger, {}))
        if pair is None:
            return "–"
        mark = {"beyond noise": "", "within noise": " ≈"}.get(pair.verdict, f" ({pair.verdict})")
        return f"{pair.difference.mean:+.3f}{mark}"


def report(results: Results, out: Path) -> str:
    """Markdown over whatever has finished."""
    measured = Measured.of(results)
    parts = ["# Three sources of error", EXPLANATION]
    titles = {"kappa": "How stale, and which curvature: κ", "error": "The quadratic model as a sum: error"}
    for metric, title in titles.items():
        parts += [f"## {title}", *(_crossed(measured, metric, one) for one in ("sequential", "replay"))]
    parts += [
        "## Which trajectory",
        _trajectories(measured),
        "## What the differences are worth",
        "Differences over the same seeds; ≈ marks those within noise, p ≥ 0.05 in a two-sided paired t-test, "
        "uncorrected for their number.",
    ]
    for metric in ("kappa", "error"):
        parts += [_differences(measured, metric), _in_words(measured, metric), _kinds(measured, metric)]
    return "\n\n".join(parts)


def _columns(title: str, names: Iterable[str]) -> list[Column]:
    return [Column(title), *map(Column, names)]


def _crossed(measured: Measured, metric: str, trajectory: str) -> str:
    rows: list[list[Cell]] = []
    for structure in measured.structures:
        for policy in measured.policies:
            cells = [measured.summary(metric, trajectory, policy, kind, structure) for kind in measured.kinds]
            if any(cells):
                rows.append([f"{structure}, {policy}", *cells, max(cell.n for cell in cells if cell)])
    return table(_columns(f"{trajectory} trajectory", [*measured.kinds, "n"]), rows)


def _trajectories(measured: Measured) -> str:
    """κ of one quadratic model on the three trajectories, and what training with it reaches."""
    rows: list[list[Cell]] = []
    for kind in measured.kinds:
        for structure in measured.structures:
            for policy in measured.policies:
                names = (policy, kind, structure)
                if own := measured.summary("kappa", "regularised", *names):
                    others = (measured.summary("kappa", trajectory, *names) for trajectory in ("sequential", "replay"))
                    counted = measured.summary("refreshes", "regularised", *names)
                    accuracy = measured.summary("accuracy", "regularised", *names)
                    rows.append([
                        f"{kind}, {structure}, {policy}", *others, own, accuracy, counted and counted.mean, own.n,
                    ])
    reached = ", ".join(
        f"{name} {found.mean:.3f} ± {found.std or 0:.3f}"
        for name in ("sequential", "replay") if (found := measured.summary("accuracy", name))
    )
    columns = [
        Column("quadratic model"), Column("κ sequential"), Column("κ replay"), Column("κ regularised by it"),
        Column("accuracy regularised", 3), Column("refreshes a task", 1), Column("n"),
    ]
    return f"Accuracy on all tasks without any quadratic model: {reached}.\n\n" + table(columns, rows)


def _differences(measured: Measured, metric: str) -> str:
    """Each comparison for every structure and kind."""
    rows: list[list[Cell]] = []
    for title, (smaller, larger) in COMPARED.items():
        for structure in measured.structures:
            cells = [
                measured.difference((metric, *smaller, kind, structure), (metric, *larger, kind, structure))
                for kind in measured.kinds
            ]
            if any(cell != "–" for cell in cells):
                rows.append([f"{title}, {structure}", *cells])
    return table(_columns(metric, measured.kinds), rows)


def _kinds(measured: Measured, metric: str) -> str:
    """Each kind less the GGN along sequential training, for every policy and structure."""
    others = [kind for kind in measured.kinds if kind != "GGN"]
    rows: list[list[Cell]] = []
    for structure in measured.structures:
        for policy in measured.policies:
            of, ggn = (metric, "sequential", policy), (metric, "sequential", policy, "GGN", structure)
            rows.append([
                f"{structure}, {policy}", *(measured.difference((*of, kind, structure), ggn) for kind in others),
            ])
    return table(_columns(f"{metric} less that of the GGN, sequential", others), rows)


def _in_words(measured: Measured, metric: str) -> str:
    """How many cells of each comparison are below zero, within noise, and above it beyond noise."""
    lines = []
    for title, (smaller, larger) in COMPARED.items():
        pairs = (
            paired(*(measured.values.get((metric, *one, kind, structure), {}) for one in (smaller, larger)))
            for kind in measured.kinds for structure in measured.structures
        )
        known = [(pair.difference.mean, pair.verdict == "beyond noise") for pair in pairs if pair is not None]
        if known:
            below = sum(mean < 0 for mean, _ in known)
            sure, above = (sum(sign * mean > 0 and beyond for mean, beyond in known) for sign in (-1, 1))
            lines.append(f"- {title}: below zero in {below} of {len(known)} cells, {sure} beyond noise; above zero "
                         f"beyond noise in {above}.")
    return "\n".join(lines)
