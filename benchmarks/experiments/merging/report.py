"""The tables and the figure of the merging experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.merging.experiment import ALONE, AVERAGE, JOINT, SLOPE, SQUARED, START, STRUCTURES
from benchmarks.harness.plots import COLOURS, MUTED, new_figure, saved, tidy
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import LEVEL, paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.harness.results import Results

TEXT = """Five networks begin from one, which was trained on {begun} examples of all classes ({images}, 12,000 training
images), and go on apart, each on a part of its own: *two classes each*, {examples} examples; or *skewed*, four fifths
from two classes and a fifth from all, and from a third of {examples} examples to five thirds. {steps} steps of Adam at
{rate:g} with batches of {batch}, thrice as fast at the start; joint training takes five times as many steps on all
parts. One network is then made of the five without any example: q_t is the quadratic model of the mean loss of part t
around its own network with a GGN in some structure, and the merged parameters are where Σ_t N_t (q_t + ½ τ ‖θ − a_t‖²)
is least (`merged_parameters`), N_t the number of examples; *average* is Σ_t N_t a_t / Σ_t N_t. *slope*: q_t with the
gradient ∇L_t(a_t), for networks that are not at a minimum. τ is tuned on seeds 1000 and 1001 (`python -m benchmarks run
tune --target merging --seeds 2 --dataset-root DIR`). Accuracy on the whole test set, all classes; *{alone}* is the mean
of the five. Double precision. Mean ± standard deviation over n seeds."""
EXACT = """## Squared error: nothing is lost

A linear head on {features} random features of 14 × 14 pixels, squared error on one-hot targets. Each head is the least
squares solution of its own part, joint training that of all, both by `QuadraticModel.minimiser`. The loss is its own
quadratic model with a dense GGN, and with a Kronecker product as well, since the curvature of several outputs is A ⊗ I:
so the minimum of the sum is joint training, with τ = 0. *gap* is the largest difference between any test output and
that of joint training."""
LOSSY = """## Softmax

The same head with softmax and cross-entropy, and two perceptrons, each way with its tuned τ."""
AGAINST = """### Against the average

What a way gains over the average, seed by seed, wherever that is beyond noise (paired t-tests, p < 0.05, uncorrected
for their number, {count}); all others are within it:"""
DRAWN = dict(zip(STRUCTURES, COLOURS))


def report(results: Results, out: Path) -> str:
    """Markdown, with the figure in `out`; from whatever has finished."""
    exact, lossy = (results.where(network=lambda n, same=same: (n == SQUARED) is same) for same in (True, False))
    sections = ["# Merging networks that were trained apart", TEXT.format_map(results.first | {"alone": ALONE})]
    if exact.columns:
        sections += [EXACT.format_map(exact.first), _exact(exact)]
    if lossy.columns:
        sections += [LOSSY, *(f"### {network}\n\n{_lossy(part)}" for network, part in lossy.by("network"))]
        _figure(lossy, out)
        sections += [*_gains(lossy), "![Accuracy by damping](merging.png)"]
    return "\n\n".join(sections)


def _exact(results: Results) -> str:
    def gap(one: Results | None) -> Cell:
        found = one.final("gap") if one else None
        return f"{found.mean:.2g}" if found else None

    return _by_split(results, "heads", "gap", gap)


def _lossy(results: Results) -> str:
    def damping(one: Results | None) -> Cell:
        return "" if one is None or one.first["damping"] is None else f"{one.first['damping']:g}"

    return _by_split(results, "networks", "τ", damping)


def _by_split(results: Results, title: str, beside: str, of: Callable[[Results | None], Cell]) -> str:
    """The accuracy of each method for each split of the classes, with a further cell beside it."""
    splits = dict(results.by("split"))
    rows: list[list[Cell]] = []
    for method, part in results.by("method"):
        found = [next(part.where(split=split).each(), None) for split in splits]
        cells = (cell for one in found for cell in (one.final("accuracy") if one else None, of(one)))
        rows.append([method, *cells, _count(part)])
    columns = [column for split in splits for column in (Column(split), Column(beside))]
    return table([Column(title), *columns, Column("n")], rows)


def _count(results: Results) -> int:
    found = [one.final("accuracy") for one in results.each()]
    return min((cell.n for cell in found if cell), default=0)


def _gains(results: Results) -> list[str]:
    """What is gained over the average, or lost, beyond noise."""
    rows: list[list[Cell]] = []
    count = 0
    for (network, split), part in results.by("network", "split"):
        base = next((one.finals("accuracy") for one in part.where(method=AVERAGE).each()), {})
        for one in part.each():
            name = one.first["method"]
            pair = paired(one.finals("accuracy"), base) if name.removesuffix(SLOPE) in STRUCTURES else None
            count += pair is not None
            if pair is not None and pair.p is not None and pair.p < LEVEL:
                rows.append([f"{network}, {split}, {name}", pair.difference, f"{pair.p:.2g}", pair.difference.n])
    columns = [Column("networks"), Column("gain"), Column("p"), Column("n")]
    return [AGAINST.format(count=count), table(columns, rows) if rows else "None."]


def _figure(results: Results, out: Path) -> None:
    """Accuracy by damping, a panel for each network and split."""
    panels = list(results.by("network", "split"))
    networks, splits = (list(dict.fromkeys(key[place] for key, _ in panels)) for place in (0, 1))
    figure = new_figure(3.5 * len(networks) + 0.4, 2.9 * len(splits) + 0.9)
    grid = figure.subplots(len(splits), len(networks), squeeze=False)
    for (network, split), part in panels:
        axes = grid[splits.index(split)][networks.index(network)]
        _draw(axes, part)
        tidy(axes, f"{network}, {split}", "damping τ", "accuracy" * (network == networks[0]), log_x=True)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    saved(figure, out / "merging.png")


def _draw(axes: Axes, results: Results) -> None:
    """The structures, dashed with the slope, between the average and joint training."""
    lowest = []
    for name, line in ((JOINT, "-"), (AVERAGE, "--"), (START, ":")):
        found = next((one.final("accuracy") for one in results.where(method=name).each()), None)
        if found:
            lowest.append(found.mean)
            axes.axhline(found.mean, color=MUTED, linestyle=line, linewidth=1.2, label=name, zorder=0)
    for one in results.each():
        method = one.first["method"]
        structure = method.removesuffix(SLOPE)
        dampings = sorted({row["damping"] for row in one.select("damped")})
        means = [summary.mean for tau in dampings if (summary := one.final("damped", damping=tau))]
        if structure in STRUCTURES and means:
            axes.plot(dampings, means, color=DRAWN[structure], linestyle="--" if method.endswith(SLOPE) else "-",
                      marker="o", markersize=3, linewidth=1.4, label=method)  # fmt: skip
    if lowest:  # what falls far below the start is out of the picture
        axes.set_ylim(bottom=min(lowest) - 0.12)
