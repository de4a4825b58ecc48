"""The table and the figure of the SAC experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    settings = (config["setting"] for label in results.labels if (config := results.config(label)))
    parts = ["# Spectral regularisation of SAC", *(_setting(setting) for setting in list(settings)[:1]), EXPLANATION]
    rows = [_row(results, label) for label in results.labels]
    panels = [
        Curves({label: results.curve(metric, label) for label in results.labels}, name, log="gradient" in metric)
        for metric, name in PANELS.items()
    ]
    plot_curves(out / "sac.png", panels, xlabel="environment step", labels=results.labels)
    columns = [Column("agent"), *COLUMNS.values(), Column("n")]
    return "\n\n".join([*parts, table(columns, rows), "![Curves](sac.png)"])


def _setting(setting: dict[str, Any]) -> str:
    return (
        f"{setting['task']} of the DeepMind control suite, {setting['steps']:,} environment steps of which the first "
        f"{setting['prefill']:,} are random, {setting['replay_ratio']} gradient steps for each other; two layers of "
        f"{setting['width']}, one critic, batch {setting['batch']}, Adam at {setting['rate']:g}, resets every "
        f"{setting['reset_every']:,} steps; {setting['episodes']} episodes with the mean action every "
        f"{setting['every']:,} steps."
    )


def _row(results: Results, label: str) -> list[Cell]:
    found = [results.final(metric, label) for metric in COLUMNS]
    strength = results.config(label).get("strength")
    return [f"{label} (λ = {strength:g})" if strength else label, *found, found[0].n if found[0] else 0]
