"""The figures of the plasticity experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.plasticity.comparisons import ACCURACY, TEST_ACCURACY
from benchmarks.harness.plots import Curves, new_figure, plot_curves, saved, tidy
from benchmarks.harness.styles import MUTED, styles
from benchmarks.harness.summary import Summary

if TYPE_CHECKING:
    from benchmarks.harness.results import Results


def accuracy_figure(results: Results, labels: list[str], out: Path, name: str) -> str:
    series = {label: curve for label in labels if (curve := results.curve(ACCURACY, label))}
    if not series:
        return ""
    panels = [Curves(series, "training accuracy")]
    tests = {label: curve for label in labels if (curve := results.curve(TEST_ACCURACY, label))}
    panels += [Curves(tests, "test accuracy")] if tests else []
    plot_curves(out / f"{name}.png", panels, xlabel="task", labels=labels)
    return f"![Accuracy at the end of each task]({name}.png)"


def strength_figure(known: dict[str, list[tuple[float, Summary]]], reference: Summary | None, out: Path) -> None:
    figure = new_figure(7.4, 3.8)
    axes = figure.subplots()
    axes.set_xscale("log")
    chosen = styles([*known])
    for name, points in known.items():
        if points:
            axes.errorbar(
                [s for s, _ in points], [v.mean for _, v in points], yerr=[v.std or 0.0 for _, v in points],
                label=name, capsize=3, linewidth=1.7, **chosen[name].line,
            )
    if reference is not None:
        axes.axhline(reference.mean, color=MUTED, linestyle="--", linewidth=1.2, label="none")
    axes.set_xlabel("strength")
    axes.set_ylabel("late accuracy")
    tidy(axes, "")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    saved(figure, out / "strengths.png")
