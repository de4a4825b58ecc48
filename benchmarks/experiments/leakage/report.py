"""The tables and figures of the leakage experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.leakage.experiment import RANDOM, TRAINED, expected
from benchmarks.harness.plots import COLOURS, MARKERS, MUTED, new_figure, saved, tidy
from benchmarks.harness.results import Summary
from benchmarks.harness.tables import Cell, Column, in_powers, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.harness import Results

KINDS = ("StepProjection", "GradientProjection", "SequentialProjection")
FIRST_TRIALS = {"momentum, stale": "4e-02", "SGD, weight decay": "2e-02", "Adam": "0.3 to 0.4"}
TITLES = {"first": "into the first task's subspace", "union": "into the union of all"}
ON_RANDOM = """## Random steps, subspaces at prescribed angles

Any two tasks' subspaces have all principal angles of one cosine c. A random step, with every task's subspace projected
out one after another (T of them), keeps √(E‖V Δ‖² / E‖Δ‖²) in the first one (*first*) and in the union of all
(*union*); in brackets the closed form, (I − G L⁻¹) b with L the lower triangle of the Gram matrix G and b ~ N(0, G).
For two tasks it is √(k c² (1 − c²) / (k c² + d − 2k)) and √(k c² / (k c² + d − 2k)). Expected: no leak where subspaces
are orthogonal or equal, most into the first near c = 1/√2 for two tasks; and rounding alone for one global basis,
whatever the angles (*global*: the largest of its leaks into the union over all T)."""
ON_TRAINED = """## Training, by optimiser

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
    parts, written = dict(results.by("part")), ["# What leaks back into a protected subspace"]
    if RANDOM in parts:
        random = parts[RANDOM]
        _angles_figure(random, out)
        written += [ON_RANDOM, _random_table(random), _agreement(random)]
        written.append("![Leakage over the cosine](leakage_angles.png)")
    if TRAINED in parts:
        choices = {name: dict(part.by("projection")) for name, part in parts[TRAINED].by("name")}
        _optimisers_figure(choices, out)
        written += [
            ON_TRAINED.format_map(parts[TRAINED].first), _trained_table(choices), _seen(choices), SINGLE,
            _trained_table(choices, "step"), "![Leakage by optimiser](leakage_optimisers.png)",
        ]  # fmt: skip
    return "\n\n".join(written)


def _random_table(random: Results) -> str:
    tasks = _tasks(random)
    shown = [(count, where) for count in (tasks[0], tasks[-1]) for where in TITLES]
    rows: list[list[Cell]] = []
    for one in random.each():
        curves = {where: _curves(one, where) for where in TITLES}
        cells: list[Cell] = []
        for count, where in shown:
            found, exact = (curve.get(count) for curve in curves[where])
            cells.append(found and exact and f"{found.mean:.4f} ({exact.mean:.4f})")
        used = [f"{value.mean:.0f}" for _, value in one.curve("used")]
        rows.append([f"{one.first['cosine']:g}", *cells, f"{_worst(one, 'union'):.0e}", ", ".join(used)])
    columns = [Column("cosine"), *(Column(f"T = {count}, {where}") for count, where in shown), Column("global")]
    return table([*columns, Column(f"rank for T = {', '.join(map(str, tasks))}")], rows)


def _agreement(random: Results) -> str:
    """How far the measured leaks are from the closed form."""
    errors = []
    for one in random.each():
        for where in TITLES:
            measured, exact = _curves(one, where)
            errors += [abs(found.mean / exact[t].mean - 1) for t, found in measured.items() if exact[t].mean > 1e-4]
    far = f"{max(errors):.1%}" if errors else "nothing"
    most = _worst(random, "union")
    return f"Seen: the closed form holds to {far} in every cell; from one basis leaks {most:.0e} at most."


def _curves(one: Results, where: str) -> list[dict[float, Summary]]:
    """The leaks of a cosine by the number of tasks, measured and in closed form."""
    return [dict(one.curve(f"{of}/{where}")) for of in ("sequential", "expected")]


def _worst(random: Results, where: str) -> float:
    """The largest leak from one basis, over all numbers of tasks and seeds."""
    return max(row["value"] for row in random.select(f"global/{where}"))


def _tasks(random: Results) -> list[int]:
    return sorted({row["step"] for row in random.select("global/union")})


Choices = Mapping[str, Mapping[str, "Results"]]
"""The runs of training, by the name of the optimiser and the class of the projection."""


def _of_kind(choices: Choices, kind: str, metric: str = "drift") -> dict[str, Summary]:
    """By optimiser: what leaks through a projection, where it has been measured."""
    found = {name: of[kind].final(metric) for name, of in choices.items() if kind in of}
    return {name: value for name, value in found.items() if value}


def _seen(choices: Choices) -> str:
    """The range of each projection over the optimisers."""
    parts = []
    for kind in KINDS:
        means = [value.mean for value in _of_kind(choices, kind).values()]
        if means:
            parts.append(f"{kind}() leaks {min(means):.0e} to {max(means):.0e}")
    return f"Seen, over the optimisers: {', '.join(parts)} of the drift."


def _trained_table(choices: Choices, metric: str = "drift") -> str:
    by_kind = [_of_kind(choices, kind, metric) for kind in KINDS]
    rows: list[list[Cell]] = []
    for name in choices:
        found = [values.get(name) for values in by_kind]
        trial = [FIRST_TRIALS.get(name)] if metric == "drift" else []
        rows.append([name, *map(in_powers, found), *trial, max((cell.n for cell in found if cell), default=0)])
    columns = [Column("optimiser"), *(Column(f"{kind}()") for kind in KINDS)]
    if metric == "drift":
        columns.append(Column("GradientProjection() in first trials"))
    return table([*columns, Column("n")], rows)


def _angles_figure(random: Results, out: Path) -> None:
    figure = new_figure(9.6, 4.0)
    for axes, (where, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items()):
        for place, count in enumerate(_tasks(random)):
            _draw_angles(axes, random, where, count, place)
        worst = [(one.first["cosine"], _worst(one, where)) for one in random.each()]
        axes.plot(*zip(*worst), color=MUTED, linestyle="--", marker=".", label="global basis, any T")
        axes.set_yscale("log")
        axes.set_xlabel("cosine of all principal angles")
        tidy(axes, f"Leak {title}")
        axes.set_ylim(1e-8, 1)
        handles, names = axes.get_legend_handles_labels()
        axes.set_ylabel("leaked part of the step" if where == "first" else "")
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9,
        title="sequential: marks measured, lines in closed form", title_fontsize=9,
    )  # fmt: skip
    saved(figure, out / "leakage_angles.png")


def _draw_angles(axes: Axes, random: Results, where: str, count: int, place: int) -> None:
    """Those measured, and the closed form in between."""
    colour, row = COLOURS[place % len(COLOURS)], random.first
    found = ((one.first["cosine"], dict(one.curve(f"sequential/{where}"))) for one in random.each())
    points = [(cosine, curve[count].mean) for cosine, curve in found if count in curve]
    axes.plot(*zip(*points), color=colour, linestyle="", marker=MARKERS[place], markersize=5, label=f"T = {count}")
    fine = [i / 400 for i in range(401)]
    closed = [getattr(expected(c, count, row["rank"], row["dimension"]), where) for c in fine]
    axes.plot(fine, closed, color=colour, linewidth=1.2)


def _optimisers_figure(choices: Choices, out: Path) -> None:
    names = list(choices)
    figure = new_figure(7.6, 1.5 + 0.32 * len(names))
    axes = figure.subplots()
    for place, kind in enumerate(KINDS):
        points = [(value.mean, names.index(name)) for name, value in _of_kind(choices, kind).items()]
        style: dict[str, Any] = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": "", "markersize": 7}
        axes.plot(*(zip(*points) if points else ((), ())), **style, label=f"{kind}()")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("leaked part of the drift in the third task")
    tidy(axes, "")
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=9)
    saved(figure, out / "leakage_optimisers.png")
