"""TensorBoard pages that compare runs: charts that overlay strategies, and a table that sorts them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Option = str | float | bool

CHARTS: dict[str, dict[str, str]] = {
    "Accuracy": {
        "Accuracy on past tasks": "accuracy/past_tasks",
        "Accuracy on the current task": "accuracy/current_task",
        "Accuracy on stored examples": "accuracy/stored",
    },
    "Fidelity": {
        "mean |κ|, each experience at its own anchor": "fidelity/accumulate/kappa_abs",
        "mean |κ|, all at the newest anchor": "fidelity/refresh/kappa_abs",
        "mean |κ| with linear term, own anchors": "fidelity/accumulate_linear/kappa_abs",
        "mean |κ| with linear term, newest anchor": "fidelity/refresh_linear/kappa_abs",
        "Gradient error γ, own anchors": "fidelity/accumulate/gamma",
        "Gradient error γ, newest anchor": "fidelity/refresh/gamma",
        "ρ = actual / predicted increase, own anchors": "fidelity/accumulate/rho_pooled",
        "ρ = actual / predicted increase, newest anchor": "fidelity/refresh/rho_pooled",
        "Distance ‖θ − a‖ to the own anchors, mean": "fidelity/accumulate/distance",
        "Distance ‖θ − a‖ to the newest anchor": "fidelity/refresh/distance",
    },
    "Growth": {
        "Past loss changed by growth alone, since each own end": "growth/accumulate",
        "Past loss changed by growth alone, since the newest end": "growth/refresh",
    },
    "Penalty": {
        "Penalty q(θ)": "penalty/raw",
        "Weighted penalty, strength · q(θ)": "penalty/weighted",
    },
    "Refreshing": {
        "Refreshes so far": "penalty/refreshes",
        "Error |L − q| of the penalty before a refresh": "penalty/error",
    },
    "Gradients": {
        "Norm of the task's gradient": "gradient/task_norm",
        "Norm of the penalty's gradient": "gradient/penalty_norm",
        "Cosine between both": "gradient/cosine",
    },
    "Landscape": {
        "Sharpness λ_max, stored examples": "landscape/stored/sharpness",
        "Sharpness λ_max, current task": "landscape/current/sharpness",
        "Trace, stored examples": "landscape/stored/trace",
        "Trace, current task": "landscape/current/trace",
        "Numerical rank, stored examples": "landscape/stored/numerical_rank",
        "Numerical rank, current task": "landscape/current/numerical_rank",
        "Effective rank, stored examples": "landscape/stored/effective_rank",
        "Effective rank, current task": "landscape/current/effective_rank",
        "Alignment of the step with the top eigenvectors": "landscape/step/alignment",
        "Alignment of the drift with the top eigenvectors": "landscape/drift/alignment",
        "Overlap of the top subspaces, now and at the anchor": "landscape/drift/overlap",
        "Trace now / trace at the anchor": "landscape/drift/trace_ratio",
    },
    "Plasticity": {
        "Training accuracy at the end of each task": "plasticity_experience/accuracy",
        "Training accuracy at the end of each task, from scratch": "plasticity_experience/accuracy_from_scratch",
        "Loss of plasticity: from scratch − continual": "plasticity_experience/loss_of_plasticity",
        "Change of the representation, task start to task start": "plasticity_experience/representation_change",
        "Effective gradient diversity": "plasticity/gradient_effective_rank",
        "Condition number of the gradients": "plasticity/gradient_condition_number",
        "Spectral norm σ₁ of the weights, mean": "plasticity/spectral_norm",
        "Condition number of the weights, mean": "plasticity/condition_number",
        "Effective rank of the weights, mean": "plasticity/effective_rank",
        "Stable rank of the weights, mean": "plasticity/stable_rank",
        "Norm ‖θ‖ of all parameters": "plasticity/parameter_norm",
        "Dormant units": "plasticity/dormant_units",
        "Units that are exactly zero": "plasticity/zero_units",
        "Effective rank of the activations, mean": "plasticity/feature_effective_rank",
    },
    "Projection": {
        "Leakage of the step into the protected space": "projection/step_leakage",
        "Leakage of the drift into the protected space": "projection/drift_leakage",
        "Dimensions used": "projection_experience/used",
        "Dimensions free": "projection_experience/free",
        "Energy of the past curvature that is kept": "projection_experience/energy",
        "Memory of the bases, bytes": "projection_experience/bytes",
        "Smallest principal angle to earlier tasks, degrees": "projection_experience/smallest_angle",
        "Overlap with earlier tasks, mean cos² of the angles": "projection_experience/overlap",
    },
}
"""Heading, title, and the scalar that the chart shows of every run."""
SHOWN_AT_FIRST = 5
"""Columns of options that the page HParams shows before any is ticked."""


def write_layout(writer: SummaryWriter, charts: Mapping[str, Mapping[str, str]] = CHARTS) -> None:
    """Fill the page Custom Scalars: one chart for each scalar, with one line for each run, under a few headings.

    `charts` maps headings to titles to names of scalars; choose the headings whose scalars the run has, for a chart
    without any stays empty. TensorBoard merges the layouts of all runs, so keep a heading the same in each.

    >>> import tempfile
    >>> from torch.utils.tensorboard import SummaryWriter
    >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
    ...     write_layout(writer)
    """
    writer.add_custom_scalars({
        heading: {title: ["Multiline", [f"^{re.escape(tag)}$"]] for title, tag in group.items()}
        for heading, group in charts.items()
    })


def write_hparams(
    writer: SummaryWriter,
    options: Mapping[str, Option],
    results: Mapping[str, float],
    *,
    columns: Mapping[str, Option] | None = None,
) -> None:
    """Fill this run's row of the page HParams: its options, and its final results to sort by.

    Each result is also written as a scalar of its name at step 0. Choose names that no curve of the run has, in a group
    of their own such as `results/accuracy`; the column is titled without the group. The row is named after the run's
    folder.

    TensorBoard takes the columns from whichever run it reads first, and shows five of the options at first. Where runs
    differ in their options, give all of them the same `columns`: every option of any run, with a value of the kind that
    it has there, the five to be shown first. Raises TypeError for an option that is no text, number or truth value.

    >>> import tempfile
    >>> from torch.utils.tensorboard import SummaryWriter
    >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
    ...     write_hparams(writer, {"policy": "Refresh", "strength": 10.0}, {"results/accuracy": 0.8})
    """
    from torch.utils.tensorboard.summary import hparams

    own, known = ({name: _shown(name, value) for name, value in some.items()} for some in (options, columns or {}))
    experiment = _titled(hparams(known or own, dict(results))[0])
    _, start, end = hparams(own, {})
    for summary in (experiment, start, end):
        writer._get_file_writer().add_summary(summary)
    for name, value in results.items():
        writer.add_scalar(name, float(value), 0)


def _titled(summary: Any) -> Any:
    """The definition of the table, its first options marked as those that differ, which TensorBoard puts first."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = summary.value[0].metadata.plugin_data
    table = HParamsPluginData.FromString(plugin.content)
    for option in table.experiment.hparam_infos[:SHOWN_AT_FIRST]:
        option.differs = True
    for metric in table.experiment.metric_infos:
        metric.display_name = metric.name.tag.partition("/")[2] or metric.name.tag
    plugin.content = table.SerializeToString()
    return summary


def _shown(name: str, value: Option) -> str | float:
    """A truth value in words, since torch would write it as a number."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str | int | float):
        raise TypeError(f"The option '{name}' is a {type(value).__name__}. Give its name, a number or a truth value.")
    return value
