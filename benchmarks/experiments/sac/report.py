"""The table and the figure of the SAC experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.plots import Curves, plot_curves
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

COLUMNS = {
    "mean_return": Column("mean return", 0, max),
    "return": Column("final return", 0, max),
    "q_value": Column("Q", 1),
    "discounted_return": Column("observed", 1),
    "spectral_norm/actor": Column("σ₁ actor", 2),
    "spectral_norm/critic": Column("σ₁ critic", 2),
    "parameter_norm/critic": Column("‖θ‖ critic", 1),
    "gradient_norm/critic": Column("‖∇‖ critic", 2),
    "seconds": Column("seconds", 0),
}
PANELS = {
    "return": "return",
    "q_value": "mean Q-value",
    "spectral_norm/critic": "mean σ₁, critic",
    "spectral_norm/actor": "mean σ₁, actor",
    "gradient_norm/critic": "gradient norm, critic",
}
EXPLANATION = """*LayerNorm* stands before each ReLU of actor and critic; *resets* draws all weights anew and keeps the
replay buffer; *spectral* regularises actor and critic, each at strength λ. *mean return* is that of all measurements
after the random steps, *final return* the last; *Q* the critic's mean over the steps of the measured episodes, and
*observed* their discounted return to the end of the episode, which has no entropy term. *σ₁* is the mean spectral norm
of the weight matrices, *‖∇‖* the mean gradient norm of the loss alone since the measurement before. Mean ± standard
deviation over n seeds."""


def report(results: Results, out: Path) -> str:
    """What was run, one row for each agent, and the curves."""
    agents = {one.label: one for one in results.each()}
    panels = [
        Curves({label: one.curve(metric) for label, one in agents.items()}, name, log="gradient" in metric)
        for metric, name in PANELS.items()
    ]
    plot_curves(out / "sac.png", panels, xlabel="environment step", labels=results.labels)
    setting = (
        "{task} of the DeepMind control suite, {steps:,} environment steps of which the first {prefill:,} are random, "
        "{replay_ratio} gradient steps for each other; two layers of {width}, one critic, batch {batch}, Adam at "
        "{rate:g}, resets every {reset_every:,} steps; {episodes} episodes with the mean action every {every:,} steps."
    ).format_map(results.first)
    rows = table([Column("agent"), *COLUMNS.values(), Column("n")], [_row(one) for one in agents.values()])
    return "\n\n".join(["# Spectral regularisation of SAC", setting, EXPLANATION, rows, "![Curves](sac.png)"])


def _row(results: Results) -> list[Cell]:
    found, strength = [results.final(metric) for metric in COLUMNS], results.first["strength"]
    name = f"{results.label} (λ = {strength:g})" if strength else results.label
    return [name, *found, found[0].n if found[0] else 0]
