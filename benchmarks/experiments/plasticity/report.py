"""The tables and the figures of the plasticity experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.plasticity.comparisons import ACCURACY, LATE, TEST_ACCURACY, against, late_mean, ratio
from benchmarks.experiments.plasticity.figures import accuracy_figure, strength_figure
from benchmarks.harness.summary import summarise
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

LAYER_NORM, LONGER = ", LayerNorm", " epochs"
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
- *shrink & perturb s* moves all parameters at every step by s of the way to a network drawn anew; *after each task*
  by 0.5 there.
- *ReDO τ* recycles units with a score of at most τ, once in each task, half-way through its steps.
- *from scratch*, *after each task* and *ReDO* are told when tasks end or how long they are; no other method is.
- *CReLU* has as many units as the others before each nonlinearity, and so more parameters after it.
- *Parseval* leaves out the last layer, *SpectralReg* nothing."""


def report(results: Results, out: Path) -> str:
    """A section for each part that has run."""
    long, normed = _marked(results, LONGER), _marked(results, LAYER_NORM)
    plain = [label for label in results.labels if label not in {*long, *normed}]
    sensitivity = _strengths(plain)
    shown = _shown(plain, sensitivity)
    parts = [f"# Plasticity over many tasks\n\n{_setting(results)}\n\n{EXPLANATION}"]
    if plain:
        parts += ["## All methods", _table(results, shown), _measures(results, shown)]
        parts += [accuracy_figure(results, shown, out, "accuracy")]
    if any(len(strengths) > 1 for strengths in sensitivity.values()):
        parts += ["## Sensitivity to the strength", _by_strength(results, sensitivity, out)]
    if normed:
        parts += ["## With LayerNorm", _with_layer_norm(results, normed), _measures(results, normed)]
        parts += [accuracy_figure(results, normed, out, "layer_norm")]
    if long:
        parts += ["## With more epochs for each task", _by_epochs(results, long)]
    return "\n\n".join(part for part in parts if part)


def _setting(results: Results) -> str:
    shown = [h for h in results.headers if not h["label"].endswith(LONGER)] or [*results.headers]
    if not shown:
        return ""
    setting = shown[0]["config"]["setting"]
    tasks = max((row["step"] for row in results.select(ACCURACY)), default=setting["tasks"])  # growing classes end
    epochs = " or ".join(map(str, sorted({header["config"]["setting"]["epochs"] for header in shown})))
    network = setting["network"]
    sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in network.items() if k not in ("class", "layer_norm"))
    images, change = setting["images"].replace("_", " "), CHANGES[setting["change"]]
    return (
        f"{tasks} {_plural('task', tasks)} of {epochs} {_plural('epoch', epochs)} each over the first "
        f"{setting['count']:,} training images of {images} in batches of {setting['batch']}, pixels in [0, 1]; "
        f"{change}. {network['class']}{f' ({sizes})' if sizes else ''}, Adam at {setting['rate']:g}, whose moments are "
        "kept from task to task."
    )


def _plural(noun: str, count: int | str) -> str:
    return noun if str(count) == "1" else f"{noun}s"


def _marked(results: Results, end: str) -> list[str]:
    return [label for label in results.labels if label.endswith(end)]


def _strengths(labels: list[str]) -> dict[str, list[float]]:
    """The strengths of each regulariser, the largest first."""
    found: dict[str, list[float]] = {}
    for label in labels:
        name, _, last = label.rpartition(" ")
        if name and name != "ReDO" and last.replace(".", "").replace("e-", "").isdigit():
            found.setdefault(name, []).append(float(last))
    return {name: sorted(strengths, reverse=True) for name, strengths in found.items()}


def _shown(labels: list[str], sensitivity: dict[str, list[float]]) -> list[str]:
    """The labels of the first table: of those with a strength, the first in the grid, which all share."""
    seen: set[str] = set()
    kept = []
    for label in labels:
        name = label.rpartition(" ")[0]
        if name not in sensitivity or name not in seen:
            kept.append(label)
        seen.add(name)
    return kept


def _table(results: Results, labels: list[str]) -> str:
    tested = any(results.select(TEST_ACCURACY))
    columns = [
        Column("method"), Column("first task"), Column("last task", 3, max), Column("late", 3, max), Column("drop"),
        Column("against scratch"), *([Column("test, late", 3, max)] if tested else []), Column("time", 2), Column("n"),
    ]
    return table(columns, [_row(results, label, tested) for label in labels])


def _row(results: Results, label: str, tested: bool) -> list[Cell]:
    late, test = results.final(LATE, label), [late_mean(results, TEST_ACCURACY, label)] if tested else []
    first = [row["value"] for row in results.select(ACCURACY, label, step=1)]
    return [
        label, summarise(first) if first else None, results.final("final_accuracy", label), late,
        results.final("drop", label), against(results, label), *test,
        ratio(results, label), late.n if late else 0,
    ]


def _measures(results: Results, labels: list[str]) -> str:
    columns = [Column("late mean of"), *(Column(name, decimals) for name, (_, decimals) in MEASURES.items())]
    rows: list[list[Cell]] = [
        [label, *(late_mean(results, metric, label) for metric, _ in MEASURES.values())] for label in labels
    ]
    note = (
        "Spectral norms (mean over the weights), ‖θ‖ and units on 64 images are at the ends of tasks; the effective "
        "rank of 64 gradients, and the relative change of activations since the task before, at their starts."
    )
    return f"{note}\n\n{table(columns, rows)}"


def _by_strength(results: Results, sensitivity: dict[str, list[float]], out: Path) -> str:
    strengths = sorted({s for found in sensitivity.values() for s in found}, reverse=True)
    rows: list[list[Cell]] = [
        [name, *(results.final(LATE, f"{name} {s:g}") for s in strengths)] for name in sensitivity
    ]
    text = table([Column("late accuracy"), *(Column(f"{s:g}") for s in strengths)], rows)
    known = {
        name: [(s, value) for s in found if (value := results.final(LATE, f"{name} {s:g}")) is not None]
        for name, found in sensitivity.items()
    }
    if not any(known.values()):
        return text
    strength_figure(known, results.final(LATE, "none"), out)
    return f"{text}\n\n![Late accuracy against strength](strengths.png)"


def _with_layer_norm(results: Results, normed: list[str]) -> str:
    names = [label.removesuffix(LAYER_NORM) for label in normed]
    without = [results.final(LATE, name) for name in names]
    known = any(without)  # else no method without it has run
    columns = [Column("method"), *([Column("without")] if known else []), Column("with", 3, max),
               Column("with, drop"), Column("with, against scratch")]
    rows: list[list[Cell]] = [
        [
            name, *([plain] if known else []), results.final(LATE, label), results.final("drop", label),
            against(results, label),
        ]
        for name, plain, label in zip(names, without, normed)
    ]
    return table(columns, rows)


def _by_epochs(results: Results, long: list[str]) -> str:
    places = [(label.split(", ")[0], int(label.split(", ")[1].split()[0])) for label in long]
    counts = sorted({count for _, count in places})
    names = [*dict.fromkeys(name for name, _ in places)]
    suffixes = {"as above": "", **{f"{count}{LONGER}": f", {count}{LONGER}" for count in counts}}
    columns = {title: [results.final(LATE, name + suffix) for name in names] for title, suffix in suffixes.items()}
    if not any(columns["as above"]):
        del columns["as above"]
    text = table([Column("late accuracy"), *map(Column, columns)], [*zip(names, *columns.values())])
    return f"No network has learned from scratch for longer, so these have no reference.\n\n{text}"
