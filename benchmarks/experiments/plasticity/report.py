"""The tables and the figures of the plasticity experiment."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.plasticity.collapse import EXPLANATION as COLLAPSE
from benchmarks.experiments.plasticity.collapse import collapse
from benchmarks.experiments.plasticity.experiment import EPOCHS, LAYER_NORM, METHODS, NONE, SCRATCH, STRENGTHS
from benchmarks.experiments.plasticity.learner import ACCURACY, TEST_ACCURACY
from benchmarks.harness import Summary
from benchmarks.harness.labels import Named, label_ends
from benchmarks.harness.plots import MUTED, Curves, name_the_rest, new_figure, plot_curves, saved, styles, tidy
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.pairs import mean_ratio, paired

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

LATE = "late_accuracy"
MEASURES = {
    "spectral norm": ("plasticity/spectral_norm", 2),
    "‖θ‖": ("plasticity/parameter_norm", 1),
    "dormant units": ("plasticity/dormant_units", 2),
    "units at zero": ("plasticity/zero_units", 2),
    "gradient diversity": ("plasticity/gradient_effective_rank", 1),
    "curvature rank": ("curvature/effective_rank", 1),
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
scratch on each task with the same seed: below zero, plasticity is lost. No strength is tuned on these seeds. Mean ±
standard deviation over n seeds.

- *L2* draws parameters to zero, *L2 init* to their initial values, *Wasserstein* their distribution to the initial one.
- *shrink & perturb s* replaces a part s of all parameters at every step by those of a network drawn anew; *after each
  task* half of them there.
- *ReDO τ* recycles units with a score of at most τ, once in each task, half-way through its steps.
- *SNR η* recycles a unit when it is silent for longer than all but a part η of its silent runs.
- *FIRE p* goes a part p of the way from each weight matrix to the nearest isometry after each task, with new moments; 1
  is its source's.
- *AdamO λ* draws all weights to isometries by a step outside of Adam's, λ times Adam's rate; its source takes 0.001 at
  a rate of 0.0001.
- *from scratch*, *after each task*, *FIRE* and *ReDO* know when tasks end or how long they are; no other method does.
- *CReLU* has as many units as the others before each nonlinearity, and so more parameters after it.
- *Parseval* leaves out the last layer, *SpectralReg* nothing."""


def report(results: Results, out: Path) -> str:
    """A section for each part that has run."""
    plain = results.where(part=lambda part: part in (METHODS, STRENGTHS))
    shown = results.where(part=METHODS) if any(results.where(part=METHODS).each()) else _one_of_each(plain)
    parts = [f"# Plasticity over many tasks\n\n{_setting(results)}\n\n{EXPLANATION}"]
    if plain.columns:
        parts += ["## All methods", _table(shown, results), _measures(shown), _accuracy_figure(shown, out, "accuracy")]
        followed = [*shown.where(row=NONE).each(), *shown.where(regulariser="SpectralReg").each()]
        if courses := [f"### {one.label}\n\n{text}" for one in followed if (text := collapse(one))]:
            parts += ["## Does the curvature collapse first?", COLLAPSE, *courses]
    sensitivity = dict(plain.where(regulariser=bool).by("regulariser"))
    if any(len(tried.columns) > 1 for tried in sensitivity.values()):
        parts += ["## Sensitivity to the strength", _by_strength(sensitivity, plain, out)]
    if (normed := results.where(part=LAYER_NORM)).columns:
        parts += ["## With LayerNorm", _with_layer_norm(normed, plain, results), _measures(normed)]
        parts += [_accuracy_figure(normed, out, "layer_norm")]
    if (long := results.where(part=EPOCHS)).columns:
        parts += ["## With more epochs for each task", _by_epochs(long, plain)]
    return "\n\n".join(part for part in parts if part)


def _one_of_each(results: Results) -> Results:
    """The first row of each regulariser."""
    return results.of(next(iter(part.columns)) for _, part in results.by("regulariser"))


def _setting(results: Results) -> str:
    shown = results.where(part=lambda part: part != EPOCHS)
    shown = shown if shown.columns else results
    row, network = shown.first, shown.config(next(iter(shown.columns)))["setting"]["network"]
    tasks = max((found["step"] for found in results.select(ACCURACY)), default=row["tasks"])  # growing classes end
    epochs = " or ".join(map(str, sorted(epochs for epochs, _ in shown.by("epochs"))))
    sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in network.items() if k not in ("class", "layer_norm"))
    return (
        f"{tasks} task{'' if tasks == 1 else 's'} of {epochs} epoch{'' if epochs == '1' else 's'} each over the first "
        f"{row['count']:,} training images of {row['images'].replace('_', ' ')} in batches of {row['batch']}, pixels "
        f"in [0, 1]; {CHANGES[row['change']]}. {row['network']}{f' ({sizes})' if sizes else ''}, Adam at "
        f"{row['rate']:g}, whose moments are kept from task to task."
    )


def _reference(one: Results, name: str, results: Results) -> Results | None:
    """A method with the same norm layers and epochs as a row; None where it has not run."""
    same = {key: one.first[key] for key in ("layer_norm", "epochs") if key in one.first}
    return next(results.where(row=name, **same).each(), None)


def against(one: Results, results: Results) -> Summary | None:
    """Late accuracy less that from scratch with the same norm layers and epochs, seed by seed; None without such."""
    reference = _reference(one, SCRATCH, results)
    if reference is None or reference.label == one.label:
        return None
    pair = paired(one.finals(LATE), reference.finals(LATE))
    return None if pair is None else pair.difference


def late_mean(results: Results, metric: str) -> Summary | None:
    """The mean over the last third of the tasks, over seeds."""
    return results.final(f"late/{metric}")


def _table(shown: Results, results: Results) -> str:
    tested = bool(results.select(TEST_ACCURACY))
    columns = [
        Column("method"), Column("first task"), Column("last task", 3, max), Column("late", 3, max), Column("drop"),
        Column("against scratch"), *([Column("test, late", 3, max)] if tested else []), Column("time", 2), Column("n"),
    ]  # fmt: skip
    cells: list[list[Cell]] = []
    for one in shown.each():
        late, plain = one.final(LATE), _reference(one, NONE, results)
        test = [late_mean(one, TEST_ACCURACY)] if tested else []
        time = mean_ratio(one.finals("seconds"), plain.finals("seconds") if plain else {})
        cells.append([
            one.label, one.final(ACCURACY, step=1), one.final("final_accuracy"), late, one.final("drop"),
            against(one, results), *test, time, late.n if late else 0,
        ])  # fmt: skip
    return table(columns, cells)


def _measures(shown: Results) -> str:
    columns = [Column("late mean of"), *(Column(name, decimals) for name, (_, decimals) in MEASURES.items())]
    rows: list[list[Cell]] = [
        [one.label, *(late_mean(one, metric) for metric, _ in MEASURES.values())] for one in shown.each()
    ]
    note = (
        "Spectral norms (mean over the weights), ‖θ‖ and units on 64 images are at the ends of tasks; the effective "
        "ranks of 64 gradients and of the GGN of 64 images, and the relative change of activations since the task "
        "before, at their starts."
    )
    return f"{note}\n\n{table(columns, rows)}"


def _by_strength(sensitivity: dict[str, Results], plain: Results, out: Path) -> str:
    found = {
        name: {one.first["strength"]: one.final(LATE) for one in tried.each()} for name, tried in sensitivity.items()
    }
    strengths = sorted(set(chain.from_iterable(found.values())), reverse=True)
    rows: list[list[Cell]] = [[name, *map(values.get, strengths)] for name, values in found.items()]
    text = table([Column("late accuracy"), *(Column(f"{s:g}") for s in strengths)], rows)
    figure = new_figure(8.6, 3.8)
    axes, ends = figure.subplots(), []
    axes.set_xscale("log")
    chosen = styles([*found], sorted(found, key=lambda name: -max(v.mean for v in found[name].values() if v)))
    for name, values in found.items():
        if points := sorted(((s, value) for s, value in values.items() if value), key=lambda point: -point[0]):
            axes.errorbar(
                [s for s, _ in points], [v.mean for _, v in points], yerr=[v.std or 0.0 for _, v in points],
                capsize=3, linewidth=1.7, **chosen[name].line,
            )  # fmt: skip
            if chosen[name].matters:
                ends.append(Named(name, points[0][0], points[0][1].mean, chosen[name].colour))
    for reference in plain.where(row=NONE).each():
        if late := reference.final(LATE):
            axes.axhline(late.mean, color=MUTED, linestyle="--", linewidth=1.2)
            ends.append(Named(NONE, strengths[0], late.mean, MUTED))
    axes.set(xlabel="strength", ylabel="late accuracy")
    tidy(axes, "")
    name_the_rest(figure, chosen)
    label_ends(figure, {axes: ends})
    saved(figure, out / "strengths.png")
    return f"{text}\n\n![Late accuracy against strength](strengths.png)"


def _late_by_row(results: Results) -> dict[str, Summary | None]:
    """Late accuracy by the name of the method with its strength."""
    return {one.first["row"]: one.final(LATE) for one in results.each()}


def _with_layer_norm(normed: Results, plain: Results, results: Results) -> str:
    late = _late_by_row(plain)
    without = [late.get(one.first["row"]) for one in normed.each()]
    known = any(without)  # else no method without it has run
    columns = [Column("method"), *([Column("without")] if known else []), Column("with", 3, max),
               Column("with, drop"), Column("with, against scratch")]
    rows: list[list[Cell]] = [
        [one.first["row"], *([value] if known else []), one.final(LATE), one.final("drop"), against(one, results)]
        for one, value in zip(normed.each(), without)
    ]
    return table(columns, rows)


def _by_epochs(long: Results, plain: Results) -> str:
    names = [name for name, _ in long.by("row")]
    columns = {"as above": _late_by_row(plain.where(row=names.__contains__))}
    for count, part in sorted(long.by("epochs"), key=lambda pair: pair[0]):
        columns[f"{count} epochs"] = _late_by_row(part)
    if not columns["as above"]:
        del columns["as above"]
    rows: list[list[Cell]] = [[name, *(late.get(name) for late in columns.values())] for name in names]
    text = table([Column("late accuracy"), *map(Column, columns)], rows)
    return f"No network has learned from scratch for longer, so these have no reference.\n\n{text}"


def _accuracy_figure(shown: Results, out: Path, name: str) -> str:
    """A link to a figure of the accuracy of each task, and on its test examples where there are some."""
    panels = []
    for metric, title in ((ACCURACY, "training accuracy"), (TEST_ACCURACY, "test accuracy")):
        if series := {one.label: curve for one in shown.each() if (curve := one.curve(metric))}:
            panels.append(Curves(series, title))
    if not panels:
        return ""
    best = sorted(shown.each(), key=lambda one: getattr(one.final(LATE), "mean", 0.0), reverse=True)
    references = [one.label for one in best if one.first["row"] in (NONE, SCRATCH)]
    matter = [*references, *(one.label for one in best if one.label not in references)]
    plot_curves(out / f"{name}.png", panels, xlabel="task", labels=list(shown.columns), matter=matter)
    return f"![Accuracy at the end of each task]({name}.png)"
