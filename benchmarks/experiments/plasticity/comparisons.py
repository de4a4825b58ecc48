"""Numbers over the tasks of several runs, seed by seed."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.harness.summary import Summary, summarise

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

ACCURACY, TEST_ACCURACY = "plasticity_experience/accuracy", "plasticity_experience/test_accuracy"
LATE, SCRATCH = "late_accuracy", "from scratch"


def against(results: Results, label: str) -> Summary | None:
    """Late accuracy less that from scratch with the same norm layers and epochs, seed by seed; None without such."""
    reference = f"{SCRATCH}{_suffix(label)}"
    if label == reference:
        return None
    own, base = ({row["seed"]: row["value"] for row in results.select(LATE, name)} for name in (label, reference))
    differences = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    return summarise(differences) if differences else None


def ratio(results: Results, label: str) -> float | None:
    """Training time in that of no method, the mean over seeds."""
    reference = f"none{_suffix(label)}"
    own, base = ({row["seed"]: row["value"] for row in results.select("seconds", name)} for name in (label, reference))
    ratios = [own[seed] / base[seed] for seed in own.keys() & base.keys() if base[seed] > 0]
    return fmean(ratios) if ratios else None


def _suffix(label: str) -> str:
    """What follows the method: ", LayerNorm", ", 40 epochs" or nothing."""
    return label[label.index(",") :] if "," in label else ""


def late_mean(results: Results, metric: str, label: str) -> Summary | None:
    """The mean over the last third of the tasks, over seeds."""
    values: dict[int, list[float]] = {}
    for row in sorted(results.select(metric, label), key=lambda row: row["step"]):
        values.setdefault(row["seed"], []).append(row["value"])
    return summarise(fmean(v[-max(1, len(v) // 3) :]) for v in values.values()) if values else None
