"""The table and the figures of the path to 0.94."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import Curves, Dots, plot_curves, plot_dots
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness import Results

TITLE = "# EWC on permuted MNIST tasks"
PUBLISHED, REPRODUCED, FIFTY_PUBLISHED = 0.94, 0.83, 0.90
EXPLANATION = f"""\
Avalanche's baselines mark EWC on permuted MNIST as not reproduced: {REPRODUCED} after ten tasks against {PUBLISHED} in
the paper (Kirkpatrick et al. 2017). Their setting: 2 × 1,000 units, ten epochs a task with batches of 256, SGD at
0.001, `ewc_lambda` 1, which is our λ = 2 with the squares of mini-batch gradients (`BatchedEmpiricalFisher`).

Each numbered row changes one thing of the row above it and keeps the rest, in a smaller setting that affords the
whole path: 2 × 400 units unless said, every training image in batches of 128, each task's curvature estimated on a
random tenth of its images at its end (`Accumulate`). Where a row says *tuned*, λ is the best of those tried on seeds
from 1000 on (`--part tune`), by the accuracy on a tenth of the training images, held out. *6 normalised*, *6 wide* and
*6 long* stand beside the path: row 6 with one more change. Row 1 sees a tenth of their examples, too few for its
learning rate, which row 2 repairs first; `--part original` is their setting as it is. All rows of a seed see the same
permutations, and those of one size start from the same weights.

*average accuracy* is over all tasks after the last, *when learned* over tasks just after each, *forgetting* the mean
loss since. *multitask*, for reference, learns all tasks at once with as many steps in all. A run whose weights diverged
has no accuracy (nan). Mean ± standard deviation over n seeds."""
SUMS = """\
Row 7 of the path, a Kronecker-factored Fisher on ten permuted MNIST tasks, by how the sum over past tasks is kept:
every term at its own anchor (*list*), or one pair of factors by partial traces unless another rule is named, either
with the slope of all terms at the newest anchor or *moved* there (`Merge`), and of the moved pair the leading
eigenvectors, to a part of its trace but at most 100 of a factor, or 48 of each. λ is the best of 3, 10 and 30 on seed
1000, by a tenth of the training images, held out (`--part tune`); that of the list, of which a run takes long, is that
of one pair."""
FIFTY = f"""\
Fifty tasks on two hidden layers of 100 units. Ritter et al. 2018, "Online structured Laplace approximations for
overcoming catastrophic forgetting", report more than {FIFTY_PUBLISHED:.2f} with merged Kronecker factors. Here each
task has one pass over all training images in batches of 128, and its curvature is that of a random tenth of them; one
anchor, the newest (`Merge`), and one pair of factors by partial traces. λ is the best of those tried on seed 1000, by a
tenth of the training images, held out (`--part tune`); that of the diagonal after 15 tasks."""
COST = """*step* is the processor time of a step with the penalty of all past tasks in that of a plain one, without the
loop around them, and *MiB* what is held of the past."""


IN_SUMS, IN_FIFTY = "one pair, moved", "Kronecker, moved"  # rows of these parts alone
MATTER = (
    "7 Kronecker", "1 Avalanche's recipe", "2 learning rate", "Naive, as row 7", "5 pixels", "6 optimiser", "6 wide"
)


def report(results: Results, out: Path) -> str:
    """Markdown with two figures, from whatever has finished."""
    curves, accuracies = {}, {}
    for one in results.each():
        accuracies[one.label] = one.final("average_accuracy")
        if len(curve := one.curve("accuracy/seen")) > 1:
            curves[one.label] = curve
    panel = Curves(curves, "mean accuracy", "on the tasks learned so far")
    plot_curves(out / "ewc_permuted_mnist.png", [panel], xlabel="tasks learned", labels=results.labels, matter=MATTER)
    published = FIFTY_PUBLISHED if IN_FIFTY in results.labels else PUBLISHED
    dots = Dots(accuracies, "average accuracy", "dashed: as published", reference=published)
    plot_dots(out / "ewc_permuted_mnist_rows.png", [dots], labels=results.labels, matter=MATTER)
    means = {label: accuracy.mean for label, accuracy in accuracies.items() if accuracy}
    reached = [f"{label} ({mean:.4f})" for label, mean in means.items() if round(mean, 2) >= published]
    figures = "![Accuracy of each row](ewc_permuted_mnist_rows.png)\n\n![Accuracy over time](ewc_permuted_mnist.png)"
    above = f"At or above {published:.2f}: {', '.join(reached) or 'none'}."
    explained, found = [EXPLANATION, *[COST] * _is_priced(results)], [_table(results), above]
    if IN_FIFTY in results.labels:
        explained = [FIFTY, COST]
    if IN_SUMS in results.labels:
        explained, found = [SUMS, COST], [_table(results)]
    return "\n\n".join([TITLE, *explained, *found, figures])


def _is_priced(results: Results) -> bool:
    return any(one.final("step") for one in results.each())


def _table(results: Results) -> str:
    priced = _is_priced(results)
    columns = [
        Column("row"), Column("change"), Column("trained by"), Column("λ"), Column("average accuracy", 4, max),
        Column("when learned", 4), Column("forgetting", 4), *[Column("step", 2), Column("MiB", 1)] * priced,
        Column("train min", 1), Column("n"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for one in results.each():
        row, accuracy, seconds = one.first, one.final("average_accuracy"), one.final("seconds")
        size, strength = one.final("bytes"), row.get("strength")  # no column where no row has one
        rows.append([
            one.label, row["changed"], _trained(**row), None if strength is None else f"{strength:g}", accuracy,
            one.final("learned"), one.final("forgetting"), *[one.final("step"), size and size.mean / 2**20] * priced,
            seconds and seconds.mean / 60, accuracy.n if accuracy else 0,
        ])  # fmt: skip
    return table(columns, rows)


def _trained(*, optimiser: str, rate: float, steps: int, batch: int, hidden: int, **others: object) -> str:
    name = "SGD" if optimiser == "Sgd" else optimiser
    return f"{name} {rate:g}, {steps:,} × {batch}, {hidden} units"
