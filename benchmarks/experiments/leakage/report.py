"""The tables and figures of the leakage experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.leakage.closed_form import expected
from benchmarks.harness.plots import new_figure, saved, tidy
from benchmarks.harness.styles import COLOURS, MARKERS, MUTED
from benchmarks.harness.summary import Summary
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.harness.results import Results

KINDS = ("StepProjection", "GradientProjection", "SequentialProjection")
FIRST_TRIALS = {"momentum, stale": "4e-02", "SGD, weight decay": "2e-02", "Adam": "0.3 to 0.4"}
TITLES = {"first": "into the first task's subspace", "union": "into the union of all"}
RANDOM = """## Random steps, subspaces at prescribed angles

Any two tasks' subspaces have all principal angles of one cosine c. A random step, with every task's subspace projected
out one after another (T of them), keeps √(E‖V Δ‖² / E‖Δ‖²) in the first one (*first*) and in the union of all
(*union*); in brackets the closed form, (I − G L⁻¹) b with L the lower triangle of the Gram matrix G and b ~ N(0, G).
For two tasks it is √(k c² (1 − c²) / (k c² + d − 2k)) and √(k c² / (k c² + d − 2k)). Expected: no leak where subspaces
are orthogonal or equal, most into the first near c = 1/√2 for two tasks; and rounding alone for one global basis,
whatever the angles (*global*: the largest of its leaks into the union over all T)."""
TRAINED = """## Training, by optimiser

Permuted digits, three tasks of {steps} steps with batches of {batch}, MLP 64-100-10, the {rank} top directions of each
task's Fisher (of {examples} examples) protected. What leaks in the third task into the span of the first two: ‖U Δ‖ /
‖Δ‖ of the drift Δ since the task's start, measured in float64 beside float32 training. Expected of
*GradientProjection()*: rounding for SGD, also with a clipped norm, which only scales; a leak wherever the optimiser
adds to a gradient or bends it. A buffer is *stale* when it was filled before the space grew, *fresh* when it is cleared
at each task's start. Avalanche keeps one optimiser across experiences, and its state with it for parameters that stay
the same objects, as here (those that grow lose it), so stale is what happens by default; Adam, AdamW and RMSprop are
stale but for *Adam, fresh*. Entries are clipped after the gradient is projected; norms as well."""
SINGLE = """What leaks of single steps, √(Σ‖U Δ‖² / Σ‖Δ‖²) over the task. `StepProjection()` corrects the drift since
the task's start, whose rounding is larger beside one step than beside the drift itself."""


def report(results: Results, out: Path) -> str:
    """Both parts, as far as there are results."""
    random = [label for label in results.labels if results.select("global/union", label)]
    trained = [label for label in results.labels if results.select("drift", label)]
    parts = ["# What leaks back into a protected subspace"]
    if random:
        _angles_figure(results, random, out)
        parts += [RANDOM, _random_table(results, random), _agreement(results, random)]
        parts.append("![Leakage over the cosine](leakage_angles.png)")
    if trained:
        _optimisers_figure(results, trained, out)
        parts += [
            TRAINED.format_map(results.config(trained[0])), _trained_table(results, trained), _seen(results, trained),
            SINGLE, _trained_table(results, trained, "step"), "![Leakage by optimiser](leakage_optimisers.png)",
        ]
    return "\n\n".join(parts)


def small(value: Summary | None) -> str | None:
    """In powers of ten.

    >>> small(Summary(1.25e-7, 2e-8, 5))
    '1.2e-07 ± 2e-08'
    """
    if value is None:
        return None
    return f"{value.mean:.1e}" + ("" if value.std is None else f" ± {value.std:.0e}")


def _random_table(results: Results, labels: list[str]) -> str:
    tasks = _tasks(results, labels)
    rows: list[list[Cell]] = []
    for label in labels:
        config = results.config(label)
        cells: list[Cell] = []
        for count in (tasks[0], tasks[-1]):
            closed = expected(config["cosine"], count, config["rank"], config["dimension"])
            for where, exact in (("first", closed.first), ("union", closed.union)):
                found = dict(results.curve(f"sequential/{where}", label)).get(count)
                cells.append(found and f"{found.mean:.4f} ({exact:.4f})")
        worst = max((row["value"] for row in results.select("global/union", label)), default=0.0)
        used = [f"{value.mean:.0f}" for _, value in results.curve("used", label)]
        rows.append([f"{config['cosine']:g}", *cells, f"{worst:.0e}", ", ".join(used)])
    columns = [Column("cosine")]
    columns += [Column(f"T = {count}, {where}") for count in (tasks[0], tasks[-1]) for where in TITLES]
    listed = ", ".join(map(str, tasks))
    return table([*columns, Column("global"), Column(f"rank for T = {listed}")], rows)


def _agreement(results: Results, labels: list[str]) -> str:
    """How far the measured leaks are from the closed form."""
    errors = []
    for label in labels:
        for where in TITLES:
            measured, exact = (dict(results.curve(f"{of}/{where}", label)) for of in ("sequential", "expected"))
            errors += [abs(found.mean / exact[t].mean - 1) for t, found in measured.items() if exact[t].mean > 1e-4]
    most = max(row["value"] for label in labels for row in results.select("global/union", label))
    far = f"{max(errors):.1%}" if errors else "nothing"
    return f"Seen: the closed form holds to {far} in every cell; from one basis leaks {most:.0e} at most."


def _by_choice(results: Results, labels: list[str]) -> dict[str, dict[str, str]]:
    """The labels, by the name of the optimiser and the class of the projection."""
    found: dict[str, dict[str, str]] = {}
    for label in labels:
        config = results.config(label)
        if config:
            found.setdefault(config["name"], {})[config["projection"]["class"]] = label
    return found


def _seen(results: Results, labels: list[str]) -> str:
    """The range of each projection over the optimisers."""
    parts, choices = [], _by_choice(results, labels).values()
    for kind in KINDS:
        found = [results.final("drift", label_of[kind]) for label_of in choices if kind in label_of]
        means = [value.mean for value in found if value]
        if means:
            parts.append(f"{kind}() leaks {min(means):.0e} to {max(means):.0e}")
    return f"Seen, over the optimisers: {', '.join(parts)} of the drift."


def _trained_table(results: Results, labels: list[str], metric: str = "drift") -> str:
    rows: list[list[Cell]] = []
    for name, label_of in _by_choice(results, labels).items():
        found = [results.final(metric, label_of[kind]) if kind in label_of else None for kind in KINDS]
        count = max((cell.n for cell in found if cell), default=0)
        trial = [FIRST_TRIALS.get(name)] if metric == "drift" else []
        rows.append([name, *(small(cell) for cell in found), *trial, count])
    columns = [Column("optimiser"), *(Column(f"{kind}()") for kind in KINDS)]
    if metric == "drift":
        columns.append(Column("GradientProjection() in first trials"))
    return table([*columns, Column("n")], rows)


def _tasks(results: Results, labels: list[str]) -> list[int]:
    return sorted({row["step"] for label in labels for row in results.select("global/union", label)})


def _angles_figure(results: Results, labels: list[str], out: Path) -> None:
    figure = new_figure(9.6, 4.0)
    for axes, (where, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items()):
        for place, count in enumerate(_tasks(results, labels)):
            _draw_angles(axes, results, labels, where, count, place)
        worst = [max(row["value"] for row in results.select(f"global/{where}", label)) for label in labels]
        cosines = [results.config(label)["cosine"] for label in labels]
        axes.plot(cosines, worst, color=MUTED, linestyle="--", marker=".", label="global basis, any T")
        axes.set_yscale("log")
        axes.set_xlabel("cosine of all principal angles")
        tidy(axes, f"Leak {title}")
        axes.set_ylim(1e-8, 1)
        handles, names = axes.get_legend_handles_labels()
        axes.set_ylabel("leaked part of the step" if where == "first" else "")
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9,
        title="sequential: marks measured, lines in closed form", title_fontsize=9,
    )
    saved(figure, out / "leakage_angles.png")


def _draw_angles(axes: Axes, results: Results, labels: list[str], where: str, count: int, place: int) -> None:
    """Those measured, and the closed form in between."""
    colour, config = COLOURS[place % len(COLOURS)], results.config(labels[0])
    found = ((results.config(label)["cosine"], dict(results.curve(f"sequential/{where}", label))) for label in labels)
    points = [(cosine, curve[count].mean) for cosine, curve in found if count in curve]
    axes.plot(*zip(*points), color=colour, linestyle="", marker=MARKERS[place], markersize=5, label=f"T = {count}")
    fine = [i / 400 for i in range(401)]
    closed = [getattr(expected(c, count, config["rank"], config["dimension"]), where) for c in fine]
    axes.plot(fine, closed, color=colour, linewidth=1.2)


def _optimisers_figure(results: Results, labels: list[str], out: Path) -> None:
    names = _by_choice(results, labels)
    figure = new_figure(7.6, 1.5 + 0.32 * len(names))
    axes = figure.subplots()
    for place, kind in enumerate(KINDS):
        labels_of = ((row, label_of[kind]) for row, label_of in enumerate(names.values()) if kind in label_of)
        points = [(value.mean, row) for row, label in labels_of if (value := results.final("drift", label))]
        title = f"{kind}()"
        axes.plot(*zip(*points), color=COLOURS[place], marker=MARKERS[place], linestyle="", markersize=7, label=title)
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("leaked part of the drift in the third task")
    tidy(axes, "")
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=9)
    saved(figure, out / "leakage_optimisers.png")
