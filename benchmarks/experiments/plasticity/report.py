"""The tables and the figures of the plasticity experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.harness.plots import Curves, new_figure, plot_curves, saved, tidy
from benchmarks.harness.styles import MUTED, styles
from benchmarks.harness.summary import Summary, summarise
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import mean_ratio, paired

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

ACCURACY, TEST_ACCURACY = "plasticity_experience/accuracy", "plasticity_experience/test_accuracy"
LATE, NONE, SCRATCH = "late_accuracy", "none", "from scratch"
MEASURES = {
    "spectral norm": ("plasticity/spectral_norm", 2),
    "‖θ‖": ("plasticity/parameter_norm", 1),
    "dormant units": ("plasticity/dormant_units", 2),
    "units at zero": ("plasticity/zero_units", 2),
    "gradient diversity": ("plasticity/gradient_effective_rank", 1),
    "representation change": ("plasticity_experience/representation_change", 2),
}
CHANGES = {
    "random_labels": "each image gets a random class anew in each task",
    "pixel_permutation": "the pixels of all images are permuted anew in each task after the first",
    "label_flip": "the classes are permuted anew in each task after the first",
    "class_incremental": "five more classes are added in each task",
}
EXPLANATION = """Accuracy is that on all training images of a task at its end, in eval mode. *late* is its mean over the
last third of the tasks, *drop* its first value − late, and *against scratch* late − that of a network trained from
scratch on each task with the same seed: below zero, plasticity is lost. No strength is tuned: each regulariser is
shown at all of them. Mean ± standard deviation over n seeds.

- *L2* draws parameters to zero, *L2 init* to their initial values, *Wasserstein* their distribution to the initial one.
- *shrink & perturb s* replaces a part s of all parameters at every step by those of a network drawn anew; *after each
  task* half of them there.
- *ReDO τ* recycles units with a score of at most τ, once in each task, half-way through its steps.
- *from scratch*, *after each task* and *ReDO* know when tasks end or how long they are; no other method does.
- *CReLU* has as many units as the others before each nonlinearity, and so more parameters after it.
- *Parseval* leaves out the last layer, *SpectralReg* nothing."""


@dataclass(frozen=True)
class Row:
    """What a label stands for."""

    label: str
    config: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The method with its strength."""
        return self.config["row"]

    @property
    def epochs(self) -> int:
        return self.config["setting"]["epochs"]

    @property
    def strength(self) -> float:
        return self.config["method"]["strength"]

    @property
    def like(self) -> tuple[Any, Any]:
        """What a reference has to share: norm layers and epochs."""
        return self.config["setting"]["network"].get("layer_norm"), self.epochs


def report(results: Results, out: Path) -> str:
    """A section for each part that has run."""
    every = [Row(label, config) for label in results.labels if (config := results.config(label))]
    of = {part: [row for row in every if row.config["part"] == part]
          for part in ("methods", "strengths", "layer_norm", "epochs")}
    plain = [*of["methods"], *of["strengths"]]
    shown = of["methods"] or _one_of_each(plain)
    parts = [f"# Plasticity over many tasks\n\n{_setting(results, every)}\n\n{EXPLANATION}"]
    if plain:
        parts += ["## All methods", _table(results, shown, every), _measures(results, shown)]
        parts += [_accuracy_figure(results, shown, out, "accuracy")]
    sensitivity: dict[str, list[Row]] = {}
    for row in plain:
        if row.config["regulariser"]:
            sensitivity.setdefault(row.config["regulariser"], []).append(row)
    if any(len(rows) > 1 for rows in sensitivity.values()):
        parts += ["## Sensitivity to the strength", _by_strength(results, sensitivity, plain, out)]
    if normed := of["layer_norm"]:
        parts += ["## With LayerNorm", _with_layer_norm(results, normed, plain, every), _measures(results, normed)]
        parts += [_accuracy_figure(results, normed, out, "layer_norm")]
    if of["epochs"]:
        parts += ["## With more epochs for each task", _by_epochs(results, of["epochs"], plain)]
    return "\n\n".join(part for part in parts if part)


def _one_of_each(rows: list[Row]) -> list[Row]:
    """The first row of each regulariser."""
    return [*{row.config["regulariser"]: row for row in reversed(rows)}.values()][::-1]


def _setting(results: Results, rows: list[Row]) -> str:
    shown = [row for row in rows if row.config["part"] != "epochs"] or rows
    if not shown:
        return ""
    setting = shown[0].config["setting"]
    tasks = max((row["step"] for row in results.select(ACCURACY)), default=setting["tasks"])  # growing classes end
    epochs = " or ".join(map(str, sorted({row.epochs for row in shown})))
    network = setting["network"]
    sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in network.items() if k not in ("class", "layer_norm"))
    images, change = setting["images"].replace("_", " "), CHANGES[setting["change"]]
    return (
        f"{tasks} task{'' if tasks == 1 else 's'} of {epochs} epoch{'' if epochs == '1' else 's'} each over the first "
        f"{setting['count']:,} training images of {images} in batches of {setting['batch']}, pixels in [0, 1]; "
        f"{change}. {network['class']}{f' ({sizes})' if sizes else ''}, Adam at {setting['rate']:g}, whose moments are "
        "kept from task to task."
    )


def _reference(row: Row, name: str, rows: list[Row]) -> str:
    """The label of a method with the same norm layers and epochs as a row; none where it has not run."""
    return next((other.label for other in rows if other.name == name and other.like == row.like), "")


def against(results: Results, row: Row, rows: list[Row]) -> Summary | None:
    """Late accuracy less that from scratch with the same norm layers and epochs, seed by seed; None without such."""
    reference = _reference(row, SCRATCH, rows)
    pair = paired(results.finals(LATE, row.label), results.finals(LATE, reference))
    return None if pair is None or reference == row.label else pair.difference


def late_mean(results: Results, metric: str, label: str) -> Summary | None:
    """The mean over the last third of the tasks, over seeds."""
    values: dict[int, list[float]] = {}
    for row in sorted(results.select(metric, label), key=lambda row: row["step"]):
        values.setdefault(row["seed"], []).append(row["value"])
    return summarise(fmean(v[-max(1, len(v) // 3) :]) for v in values.values()) if values else None


def _table(results: Results, shown: list[Row], rows: list[Row]) -> str:
    tested = any(results.select(TEST_ACCURACY))
    columns = [
        Column("method"), Column("first task"), Column("last task", 3, max), Column("late", 3, max), Column("drop"),
        Column("against scratch"), *([Column("test, late", 3, max)] if tested else []), Column("time", 2), Column("n"),
    ]
    cells: list[list[Cell]] = []
    for row in shown:
        label, late = row.label, results.final(LATE, row.label)
        test = [late_mean(results, TEST_ACCURACY, label)] if tested else []
        seconds = (results.finals("seconds", name) for name in (label, _reference(row, NONE, rows)))
        cells.append([
            label, results.final(ACCURACY, label, step=1), results.final("final_accuracy", label), late,
            results.final("drop", label), against(results, row, rows), *test, mean_ratio(*seconds),
            late.n if late else 0,
        ])
    return table(columns, cells)


def _measures(results: Results, shown: list[Row]) -> str:
    columns = [Column("late mean of"), *(Column(name, decimals) for name, (_, decimals) in MEASURES.items())]
    rows: list[list[Cell]] = [
        [row.label, *(late_mean(results, metric, row.label) for metric, _ in MEASURES.values())] for row in shown
    ]
    note = (
        "Spectral norms (mean over the weights), ‖θ‖ and units on 64 images are at the ends of tasks; the effective "
        "rank of 64 gradients, and the relative change of activations since the task before, at their starts."
    )
    return f"{note}\n\n{table(columns, rows)}"


def _by_strength(results: Results, sensitivity: dict[str, list[Row]], plain: list[Row], out: Path) -> str:
    found = {name: {row.strength: results.final(LATE, row.label) for row in rows} for name, rows in sensitivity.items()}
    strengths = sorted({strength for values in found.values() for strength in values}, reverse=True)
    rows: list[list[Cell]] = [[name, *(values.get(s) for s in strengths)] for name, values in found.items()]
    text = table([Column("late accuracy"), *(Column(f"{s:g}") for s in strengths)], rows)
    reference = next((results.final(LATE, row.label) for row in plain if row.name == NONE), None)
    figure = new_figure(7.4, 3.8)
    axes = figure.subplots()
    axes.set_xscale("log")
    chosen = styles([*found])
    for name, values in found.items():
        if points := sorted(((s, value) for s, value in values.items() if value), key=lambda point: -point[0]):
            axes.errorbar(
                [s for s, _ in points], [v.mean for _, v in points], yerr=[v.std or 0.0 for _, v in points],
                label=name, capsize=3, linewidth=1.7, **chosen[name].line,
            )
    if reference is not None:
        axes.axhline(reference.mean, color=MUTED, linestyle="--", linewidth=1.2, label=NONE)
    axes.set(xlabel="strength", ylabel="late accuracy")
    tidy(axes, "")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    saved(figure, out / "strengths.png")
    return f"{text}\n\n![Late accuracy against strength](strengths.png)"


def _with_layer_norm(results: Results, normed: list[Row], plain: list[Row], every: list[Row]) -> str:
    labels = {row.name: row.label for row in plain}
    without = [results.final(LATE, labels.get(row.name, "")) for row in normed]
    known = any(without)  # else no method without it has run
    columns = [Column("method"), *([Column("without")] if known else []), Column("with", 3, max),
               Column("with, drop"), Column("with, against scratch")]
    rows: list[list[Cell]] = [
        [
            row.name, *([value] if known else []), results.final(LATE, row.label), results.final("drop", row.label),
            against(results, row, every),
        ]
        for row, value in zip(normed, without)
    ]
    return table(columns, rows)


def _by_epochs(results: Results, long: list[Row], plain: list[Row]) -> str:
    names = [*dict.fromkeys(row.name for row in long)]
    columns = {"as above": {row.name: row.label for row in plain if row.name in names}}
    for count in sorted({row.epochs for row in long}):
        columns[f"{count} epochs"] = {row.name: row.label for row in long if row.epochs == count}
    if not columns["as above"]:
        del columns["as above"]
    rows: list[list[Cell]] = [
        [name, *(results.final(LATE, labels.get(name, "")) for labels in columns.values())] for name in names
    ]
    text = table([Column("late accuracy"), *map(Column, columns)], rows)
    return f"No network has learned from scratch for longer, so these have no reference.\n\n{text}"


def _accuracy_figure(results: Results, rows: list[Row], out: Path, name: str) -> str:
    """A link to a figure of the accuracy of each task, and on its test examples where there are some."""
    labels, panels = [row.label for row in rows], []
    for metric, title in ((ACCURACY, "training accuracy"), (TEST_ACCURACY, "test accuracy")):
        if series := {label: curve for label in labels if (curve := results.curve(metric, label))}:
            panels.append(Curves(series, title))
    if not panels:
        return ""
    plot_curves(out / f"{name}.png", panels, xlabel="task", labels=labels)
    return f"![Accuracy at the end of each task]({name}.png)"
