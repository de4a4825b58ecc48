"""The table and the figure of the rank cut experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TEXT = """Sine stream of {experiences} tasks, MLP 2-100-2 (502 parameters), `Eigenspace(Fisher(), Rank(k),
WholeModel())` of all examples of each task, the step projected; Adam {rate}, decay {weight_decay}, cosine per task,
{steps} steps a task, batch {batch}.

The research log (section 7.1) cuts at k = 1000, beyond the number of parameters: the model should be frozen, the
accuracy of training batches fluctuates all the same, and the distance from the task's start is below 1e-7. Expected
here: exactly 0 from the second task on, for with nothing free the parameters are put back as they were.

*free* dimensions are those in the second task and in the last. *distance* is the largest ‖θ − a‖₂ after any step from
the second task on, with a the parameters at the start of its task. *fluctuation* is the standard deviation of the
batches' accuracy within tasks, from the second on, and *of sampling* what drawing them gives by itself where nothing
moves, √(p (1 − p) / b · (N − b) / (N − 1)) for batches of b among N examples: equal where the model is frozen. *past*
is the mean test accuracy on all tasks but the last at the end; *present* that on each task but the first just after it
was trained; *average* that on all at the end. *bent* is along how many of the directions kept of the first task its
loss bends at all (eigenvalues above 1e-7 of the largest). Directions with less than 1e-5 of the largest eigenvalue stay
free, so that cuts beyond them are the same; but a cut of as many directions as there are parameters closes them all.
Mean ± standard deviation over n seeds."""


MEASURES = ("fluctuation", "sampling", "past", "present", "average")


def report(results: Results, out: Path) -> str:
    """A table by rank, and the course of one run's batches and distances."""
    parts, setting = {one.label: one for one in results.each()}, results.first
    marks = [float(i * setting["steps"]) for i in range(1, setting["experiences"])]
    accuracy, distance = (
        {label: one.curve(metric, seed=0) for label, one in parts.items()} for metric in ("batch_accuracy", "distance")
    )
    first, last = next(iter(parts)), list(parts)[-1]
    plot_curves(
        out / "rank_cut.png",
        [
            Curves({label: accuracy[label] for label in (first, last)}, "accuracy",
                   "Accuracy of each training batch, seed 0", marks=marks),
            Curves(distance, "‖θ − a‖₂", "Distance from the start of the task, seed 0", marks=marks),
        ],
        xlabel="training iteration", labels=results.labels,
    )  # fmt: skip
    columns = [
        Column("cut"), Column("free, second task"), Column("free, last"), Column("bent", 0), Column("distance"),
        Column("fluctuation"), Column("of sampling"), Column("past"), Column("present"), Column("average"), Column("n"),
    ]  # fmt: skip
    text = [TEXT.format_map(setting), table(columns, [_row(one) for one in parts.values()])]
    return "\n\n".join(
        ["# A rank cut beyond the number of parameters", *text, "![Batch accuracy and distance](rank_cut.png)"]
    )


def _row(results: Results) -> list[Cell]:
    free = [results.final(f"free/{number}") for number in (1, results.first["experiences"] - 1)]
    far = results.final("largest_distance")
    return [
        results.label, *(cell and f"{cell.mean:.0f}" for cell in free), results.final("bent"),
        far and (f"{far.mean:.3f}" if far.mean else "0 exactly"),
        *(results.final(metric) for metric in MEASURES), far.n if far else 0,
    ]  # fmt: skip
