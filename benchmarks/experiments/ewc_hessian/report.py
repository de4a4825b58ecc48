"""The report of the comparison of matrices in EWC's penalty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.ewc_hessian.experiment import BORROWED, FRACTION, PLAIN, REFERENCE, SQUARED
from benchmarks.harness.plots import Curves, Dots, plot_curves, plot_dots
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import paired

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

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
    networks = dict(results.by("activation"))
    tables = [_table(results), _claim(networks), _pairs(networks), _matrices(networks)]
    return "\n\n".join([TITLE, WANTING, _setting(results), *tables, *_figures(results, networks, out)])


def _setting(results: Results) -> str:
    setting = results.first
    return (
        f"{setting['stream']}, {setting['experiences']} experiences of {setting['steps']} steps with batches of "
        f"{setting['batch']} from {setting['examples']:,} random training examples each (all where there are fewer), "
        f"every test set whole; one hidden layer of {setting['hidden']}, Adam at {setting['rate']:g}. Diagonals, one "
        f"anchor an experience, of a random {FRACTION:.0%} of its examples. Mean ± standard deviation over n seeds."
    )


def _table(results: Results) -> str:
    rows: list[list[Cell]] = []
    for one in results.each():
        values = [one.final(name) for name in ("average_accuracy", "forgetting", "learned", "seconds")]
        strength = one.first.get("strength")
        rows.append([one.label, "" if strength is None else f"{strength:g}", *values, values[0].n if values[0] else 0])
    columns = [
        Column("penalty"), Column("λ"), Column("average accuracy", 4), Column("forgetting", 4),
        Column("accuracy when learned", 4), Column("train s", 1), Column("n"),
    ]  # fmt: skip
    return table(columns, rows)


def _compared(network: Results, penalty: str, reference: str) -> list[Cell]:
    """The cells of a comparison of final average accuracies on a network, seed by seed."""
    pair = paired(*(
        next((one.finals("average_accuracy") for one in network.where(penalty=name).each()), {})
        for name in (penalty, reference)
    ))  # fmt: skip
    if pair is None:
        return [None, None, None, 0]
    return [pair.difference, "–" if pair.p is None else f"{pair.p:.2g}", pair.verdict, pair.difference.n]


def _claim(networks: Mapping[str, Results]) -> str:
    """The note's claim, with and without a strength of its own for the squared batch gradient."""
    rows: list[list[Cell]] = [
        [f"{activation}, {title}", *_compared(network, "Hessian", name)]
        for activation, network in networks.items()
        for name, title in ((BORROWED, "both at the Hessian's λ"), (SQUARED, "each at its own λ"))
    ]
    columns = [Column("strengths"), Column("gain", 4), Column("p"), Column("verdict"), Column("n")]
    return (
        "The note's claim: what the Hessian gains over the squared batch gradient in average accuracy, seed by seed "
        "(same weights, batches and permutations; beyond noise: p < 0.05 in a paired t-test, uncorrected for the "
        "number of rows):\n\n" + table(columns, rows)
    )


def _pairs(networks: Mapping[str, Results]) -> str:
    rows: list[list[Cell]] = [
        [one.label, *_compared(network, one.first["penalty"], REFERENCE)]
        for network in networks.values() for one in network.each() if one.first["penalty"] != REFERENCE
    ]  # fmt: skip
    columns = [Column("penalty"), Column("less the Fisher", 4), Column("p"), Column("verdict"), Column("n")]
    return (
        "Average accuracy less that of the Fisher on the same network, by the same test. With ReLU the Hessian and the "
        "Fisher are two computations of the same numbers, which differ by rounding:\n\n" + table(columns, rows)
    )


def _matrices(networks: Mapping[str, Results]) -> str:
    """How the matrices differ at the first anchor."""
    rows: list[list[Cell]] = []
    for activation, network in networks.items():
        for one in network.where(penalty=PLAIN).each():
            for name in dict.fromkeys(row["matrix"] for row in one.select("trace")):
                found = [one.final(metric, matrix=name) for metric in ("trace", "negative", "gap")]
                rows.append([f"{activation}, {name}", *found])
    columns = [Column("matrix"), Column("trace", 2), Column("negative entries", 4), Column("‖C − F‖ / ‖F‖", 4)]
    return (
        "The diagonals themselves after the first experience, before negative entries are clipped; F is the "
        "Fisher's:\n\n" + table(columns, rows)
    )


def _figures(results: Results, networks: Mapping[str, Results], out: Path) -> list[str]:
    """Links to what was drawn: the tuned penalties also by themselves, once there are any; the others are far off."""
    panels = [
        Curves(
            {one.first["penalty"]: curve for one in network.each() if (curve := one.curve("accuracy/seen"))},
            "accuracy on seen tasks", activation,
        )
        for activation, network in networks.items()
    ]
    names = [penalty for penalty, _ in results.by("penalty")]
    plot_curves(out / "seen.png", panels, xlabel="training iteration", labels=names)
    links = ["![Accuracy on the tasks seen so far](seen.png)"]
    tuned = results.where(penalty=lambda own: own not in (PLAIN, BORROWED))
    shown = [one for one in tuned.each() if one.finals("average_accuracy")]
    if not shown:
        return links
    dots = [
        Dots({one.label: one.final(metric) for one in shown}, text)
        for metric, text in (("average_accuracy", "average accuracy"), ("forgetting", "forgetting"))
    ]
    plot_dots(out / "final.png", dots, labels=[one.label for one in shown])
    return [*links, "![Final accuracy and forgetting of the tuned penalties](final.png)"]
