"""The table of times."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.speed.changes import since_the_last
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

TITLES = {
    "step/naive": ("one training step of Naive, through Avalanche's loop", None),
    "step/curvature_ewc": ("CurvatureEWC, diagonal, after 20 experiences", 1.12),
    "step/curvature_ewc_one": ("CurvatureEWC, diagonal, after 1 experience", None),
    "step/kronecker": ("CurvatureEWC, one pair of Kronecker factors, after 20 experiences", 3.5),
    "step/kronecker_cut": ("the pair cut to 48 eigenvectors of each factor, after 20 experiences", 1.8),
    "step/ekfac_cut": ("EKFAC, cut to 48 eigenvectors of each factor, after 20 experiences", 2.5),
    "step/low_rank": ("LowRank, 10 eigenvectors, after 20 experiences", 1.5),
    "step/ewc_separate": ("Avalanche's EWC, separate, after 20 experiences", None),
    "step/ewc_online": ("Avalanche's EWC, online, after 20 experiences", None),
    "step/idle": ("Naive with all metrics attached, at iterations that none measures", None),
    "attached/plain": ("one training step in a plain loop", None),
    "attached/attached": ("CurvatureRegularizer attached, diagonal, after 1 task", 1.1),
    "attached/added": ("the same penalty in the loss", None),
    "attached_small/plain": ("one step of a GPT of 83 thousand parameters on 512 bytes, plain loop", None),
    "attached_small/attached": ("CurvatureRegularizer attached, diagonal, after 1 task", 1.02),
    "attached_small/added": ("the same penalty in the loss", None),
    "attached_medium/plain": ("one step of a GPT of 3.3 million parameters on 4,096 bytes, plain loop", None),
    "attached_medium/attached": ("CurvatureRegularizer attached, diagonal, after 1 task", 1.02),
    "attached_medium/added": ("the same penalty in the loss", None),
    "estimate/gradients": ("one epoch of plain gradient passes", None),
    "estimate/empirical_fisher": ("exact empirical-Fisher diagonal", 1.2),
    "estimate/fisher": ("exact Fisher diagonal", 2.3),
    "estimate/ewc": ("Avalanche's importance (not per example)", None),
    "fidelity/gradients": ("one gradient pass over the stored examples", None),
    "fidelity/accumulate": ("all fidelity values, accumulated model", 1.4),
    "fidelity/refresh": ("all fidelity values, refreshed model", 1.5),
    "on/gradients": ("one plain gradient pass over a batch", None),
    "on/check": ("AdaptiveRefresh: one look at the stored examples", None),
    "on/refresh": ("AdaptiveRefresh: one refresh, Fisher diagonal", None),
    "on/landscape_empirical": ("landscape of 200 examples, empirical Fisher", None),
    "on/landscape_fisher": ("landscape of 200 examples, Fisher", None),
    "on/landscape_hessian": ("landscape of 200 examples, Hessian, by Lanczos iteration", None),
    "measured/naive": ("a step of Naive that nothing measures", None),
    "measured/fidelity": ("with fidelity_metrics(every=1), 256 stored examples", None),
    "measured/landscape_empirical": ("with landscape_metrics(every=1), 200 current examples, empirical Fisher", None),
    "measured/landscape_fisher": ("with landscape_metrics(every=1), 200 current examples, Fisher", None),
    "measured/refresh": ("CurvatureEWC, Refresh, diagonal, 256 stored examples", None),
    "measured/adaptive": ("CurvatureEWC, AdaptiveRefresh that looks at every step, and refreshes at none", None),
    "mitigated/plain": ("one step of an MLP with 4 hidden layers of 256, plain loop", None),
    "mitigated/spectral": ("SpectralRegularizer", 1.05),
    "mitigated/exact": ("the same penalty by exact SVD: the price avoided", None),
    "mitigated/l2": ("L2", 1.1),
    "mitigated/l2_init": ("L2Init", 1.1),
    "mitigated/shrink_perturb": ("ShrinkAndPerturb at every step", 1.1),
    "mitigated/redo": ("ReDO(every=100)", 1.1),
    "mitigated/wasserstein": ("Wasserstein", 1.1),
    "mitigated/streaming_ewc": ("StreamingEWC", 1.08),
    "mitigated/parseval": ("Parseval", 1.3),
    "mitigated/parseval_4": ("Parseval(every=4)", 1.3),
    "images/plain": ("one step of ResNet-18 on 64×64 images", None),
    "images/spectral": ("SpectralRegularizer", 1.04),
    "images/exact": ("the same penalty by exact SVD", None),
    "projected/naive": ("one training step of Naive, through Avalanche's loop", None),
    "projected/flat_20": ("OrthogonalProjection, 20 directions in all parameters", 1.9),
    "projected/flat_100": ("OrthogonalProjection, 100 directions in all parameters", 3.5),
    "projected/inputs_100": ("OrthogonalProjection, 100 directions of each layer's inputs", 1.5),
    "merge/qr": ("orthonormal basis of 220 directions, by QR", None),
    "merge/merge": ("20 directions that join an orthonormal basis of 200", 0.2),
    "suite/training": ("training of six runs of some ten seconds each", None),
    "suite/one_job": ("the whole command that runs them one after the other: records, event files, reports", 1.03),
    "suite/two_jobs": ("the same with --jobs 2 on two cores, the start of the processes included", 0.64),
}
"""By group and work: what it is, and the ratio that is the goal on a quiet machine."""


def report(results: Results, out: Path) -> str:
    """One row for each work, and what has changed since the commit before."""
    columns = [
        Column("work"), Column("milliseconds", 2), Column("ratio", 2), Column("noise"), Column("goal"), Column("n")
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for name, (title, goal) in TITLES.items():
        time, ratio, noise = (results.final(f"{name}/{what}") for what in ("milliseconds", "ratio", "noise"))
        spread = f"{100 * noise.mean:.1f} %" if noise and noise.mean else ""
        rows.append([title, time, ratio, spread, f"≤ {goal}" if goal else "", ratio.n if ratio else 0])
    return (
        f"# Cost on {results.label}\n\nMedians over interleaved rounds in one process, one thread; ratios to the first "
        "row of each group, over n repetitions of the benchmark. Noise: the standard error of the median ratio, from "
        "the spread over rounds. Metrics that are not attached cost nothing. "
        "A round of a mitigator on the MLP has as many steps as the longest of its periods, so that it holds all "
        "of its work.\n\n"
        f"{table(columns, rows)}\n\n{since_the_last(results, {name: title for name, (title, _) in TITLES.items()})}"
    )
