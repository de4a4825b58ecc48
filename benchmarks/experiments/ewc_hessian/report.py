"""The report of the comparison of matrices in EWC's penalty."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.plots import Curves, Dots, plot_curves, plot_dots
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import paired

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

PLAIN, REFERENCE, SQUARED = "no penalty", "Fisher", "squared batch gradient"
BORROWED = f"{SQUARED} at the Hessian's λ"  # the note's comparison: one strength for both
FRACTION = 0.25  # of an experience's training examples: those that its curvature is estimated on
Places = dict[str, dict[str, str]]
"""The label by activation and penalty, of what has run."""

TITLE = '# The Hessian in EWC: Figure 2 of "An Optimization View of EWC"'
WANTING = """\
The note (section 3.3) puts the second derivative of the loss in the place of the squared gradient and finds in its
Figure 2, which has no numbers, that permuted MNIST is then remembered better. Two things are wanting there. It names no
strength of its own for either, but the matrices differ in scale, so that a common λ compares strengths and not
matrices. And common code squares the gradient of a *mini-batch mean*, in which the gradients of its B examples partly
cancel: the result shrinks with the batch size, at a minimum as 1/B. Here every matrix has a strength of its own, the
best of decades and of 3 times decades around the best, on seeds 1000 and 1001 (`python -m benchmarks run tune --target
ewc_hessian --seeds 2 --dataset-root DIR`), and the last row of each network is the comparison at a common strength: the
squared batch gradient at the Hessian's λ.

The Hessian is exact. Where its diagonal is negative, the entry is set to zero (`Clip()`): of the penalties that are
bounded below it is the nearest, where absolute values would hold back parameters that the note's formula lets go. With
ReLU each output is piecewise linear in any single weight, so that the diagonal of the Hessian is exactly that of the
Fisher, and nothing is left to win by second derivatives; with tanh they differ."""


def report(results: Results, out: Path) -> str:
    """Markdown, with figures in `out`; from whatever has finished."""
    places: Places = {}
    setting: dict[str, Any] = {}
    for label in results.labels:
        if config := results.config(label):
            setting = config["setting"]
            places.setdefault(setting["activation"], {})[config["penalty"]] = label
    blocks = [TITLE, WANTING, *([_setting(setting)] if setting else [])]
    blocks += [_table(results, places), _claim(results, places), _pairs(results, places), _matrices(results, places)]
    return "\n\n".join([*blocks, *_figures(results, places, out)])


def _setting(setting: dict[str, Any]) -> str:
    return (
        f"{setting['stream']}, {setting['experiences']} experiences of {setting['steps']} steps with batches of "
        f"{setting['batch']} from {setting['examples']:,} random training examples each (all where there are fewer), "
        f"every test set whole; one hidden layer of {setting['hidden']}, Adam at {setting['rate']:g}. Diagonals, one "
        f"anchor an experience, of a random {FRACTION:.0%} of its examples. Mean ± standard deviation over n seeds."
    )


def _table(results: Results, places: Places) -> str:
    rows: list[list[Cell]] = []
    for label in (label for labels in places.values() for label in labels.values()):
        values = [results.final(name, label) for name in ("average_accuracy", "forgetting", "learned", "seconds")]
        strength = results.config(label)["method"].get("strength")
        rows.append([label, "" if strength is None else f"{strength:g}", *values, values[0].n if values[0] else 0])
    columns = [
        Column("penalty"), Column("λ"), Column("average accuracy", 4), Column("forgetting", 4),
        Column("accuracy when learned", 4), Column("train s", 1), Column("n"),
    ]
    return table(columns, rows)


def _compared(results: Results, label: str | None, reference: str | None) -> list[Cell]:
    """The cells of a comparison of final average accuracies, seed by seed."""
    pair = paired(*(results.finals("average_accuracy", name or "") for name in (label, reference)))
    if pair is None:
        return [None, None, None, 0]
    return [pair.difference, "–" if pair.p is None else f"{pair.p:.2g}", pair.verdict, pair.difference.n]


def _claim(results: Results, places: Places) -> str:
    """The note's claim, with and without a strength of its own for the squared batch gradient."""
    rows: list[list[Cell]] = [
        [f"{activation}, {title}", *_compared(results, labels.get("Hessian"), labels.get(name))]
        for activation, labels in places.items()
        for name, title in ((BORROWED, "both at the Hessian's λ"), (SQUARED, "each at its own λ"))
    ]
    columns = [Column("strengths"), Column("gain", 4), Column("p"), Column("verdict"), Column("n")]
    return (
        "The note's claim: what the Hessian gains over the squared batch gradient in average accuracy, seed by seed "
        "(same weights, batches and permutations; beyond noise: p < 0.05 in a paired t-test, uncorrected for the "
        "number of rows):\n\n" + table(columns, rows)
    )


def _pairs(results: Results, places: Places) -> str:
    rows: list[list[Cell]] = [
        [label, *_compared(results, label, labels.get(REFERENCE))]
        for labels in places.values() for name, label in labels.items() if name != REFERENCE
    ]
    columns = [Column("penalty"), Column("less the Fisher", 4), Column("p"), Column("verdict"), Column("n")]
    return (
        "Average accuracy less that of the Fisher on the same network, by the same test. With ReLU the Hessian and the "
        "Fisher are two computations of the same numbers, which differ by rounding:\n\n" + table(columns, rows)
    )


def _matrices(results: Results, places: Places) -> str:
    """How the matrices differ at the first anchor."""
    rows: list[list[Cell]] = []
    for activation, labels in places.items():
        label = labels.get(PLAIN, "")
        for name in dict.fromkeys(row["matrix"] for row in results.select("trace", label)):
            found = [results.final(metric, label, matrix=name) for metric in ("trace", "negative", "gap")]
            rows.append([f"{activation}, {name}", *found])
    columns = [Column("matrix"), Column("trace", 2), Column("negative entries", 4), Column("‖C − F‖ / ‖F‖", 4)]
    return (
        "The diagonals themselves after the first experience, before negative entries are clipped; F is the "
        "Fisher's:\n\n" + table(columns, rows)
    )


def _figures(results: Results, places: Places, out: Path) -> list[str]:
    """Links to what was drawn: the tuned penalties also by themselves, once there are any; the others are far off."""
    panels = [
        Curves(
            {name: curve for name, label in labels.items() if (curve := results.curve("accuracy/seen", label))},
            "accuracy on seen tasks", activation,
        )
        for activation, labels in places.items()
    ]
    names = list(dict.fromkeys(name for labels in places.values() for name in labels))
    plot_curves(out / "seen.png", panels, xlabel="training iteration", labels=names)
    links = ["![Accuracy on the tasks seen so far](seen.png)"]
    shown = [
        label for labels in places.values() for name, label in labels.items()
        if name not in (PLAIN, BORROWED) and results.finals("average_accuracy", label)
    ]
    if not shown:
        return links
    dots = [
        Dots({label: results.final(metric, label) for label in shown}, text)
        for metric, text in (("average_accuracy", "average accuracy"), ("forgetting", "forgetting"))
    ]
    plot_dots(out / "final.png", dots, labels=shown)
    return [*links, "![Final accuracy and forgetting of the tuned penalties](final.png)"]
