"""Tables that help to choose, from published records: which method for which scenario, which structure for which model.

Documents show them between lines that cog fills (``python -m benchmarks readme``)::

    <!-- [[[cog from benchmarks.harness.decisions import scenarios; scenarios() ]]] -->
    <!-- [[[end]]] -->
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, TypeAlias

from benchmarks.harness.published import files, read
from benchmarks.harness.results import Results, Summary
from benchmarks.harness.tables import Cell, Column, table
from benchmarks.strategies import STRATEGIES

SCRATCH, PRETRAINED = "from scratch", "on pretrained features"
RECORDS = (
    ("task-incremental", SCRATCH, "compare-split_mnist-task"),
    ("task-incremental", PRETRAINED, "compare-split_mnist_pretrained-task"),
    ("domain-incremental", SCRATCH, "compare-split_mnist-domain"),
    ("domain-incremental", PRETRAINED, "compare-split_mnist_pretrained-domain"),
    ("class-incremental", SCRATCH, "compare-split_mnist-class"),
    ("class-incremental", PRETRAINED, "compare-split_mnist_pretrained-class"),
)  # scenario, what is trained, published results
LEAST, MOST = "Naive", "JointTraining"
BOUNDS = (LEAST, MOST, "Cumulative")
OURS, ACCURACY = "CurvatureEWC", "average_accuracy"
NOTHING, LITTLE = 0.1, 0.5
"""Of the way from Naive to all at once, below which a method does not help, and helps little."""
ENOUGH = 0.01  # of accuracy between Naive and all at once, below which there is nothing to keep
NAMED = 3
SCENARIOS_NOTE = f"""Average accuracy on split MNIST after the last of five tasks, mean ± standard deviation over \
{{seeds}} seeds; each strength tuned on a seed that is not reported. Several names are within a standard deviation of \
the best, whose accuracy stands beside them; of `{OURS}` the best row alone is named. *Does not*{{nothing}}: \
less than a tenth of the way from Naive to all at once; *little helps*: less than half. *Pretrained features*: a \
linear head on a frozen network that was trained on ImageNet; with a head for each task it has nothing to forget. \
What is beyond noise is in the table of each record."""

PLAIN, AT_ONCE = "Naive", "all at once"  # methods of `structures` that keep no matrix
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
STRUCTURES_NOTE = """Accuracy: after the last of {tasks} tasks of permuted digits, mean ± standard deviation over \
{seeds} seeds, λ tuned on a seed that is not reported. Build: how long an estimate takes, in epochs of gradient passes \
over the same examples in brackets; step: a training step with the penalty of one past task, in steps of Naive in \
brackets. Both are from `run cost` at commit {commit}, one thread, on its data, of an empirical Fisher where it has no \
row of one sample. A dash: not run, since the matrix is too large, or not timed."""

Rows: TypeAlias = list[list[Cell]]


def scenarios() -> None:
    """Print, while cog fills a document, which method to take in which scenario."""
    import cog  # exists while cog fills a document

    published = files()
    records = [(scenario, way, read(published[name])) for scenario, way, name in RECORDS if name in published]
    cog.out(f"\n{by_scenario(records)}\n\n")


def structures() -> None:
    """Print, while cog fills a document, what each structure takes and keeps on each model."""
    import cog  # exists while cog fills a document

    published = files()
    cog.out(f"\n{by_structure(read(published['structures']), read(published['cost']))}\n\n")


def by_scenario(records: Sequence[tuple[str, str, Results]]) -> str:
    """A row for each (scenario, what is trained, results of `compare`): from what Naive keeps, by the best method that
    stores no examples and the best that does, to all at once."""
    titles = ("scenario", "trained", "Naive", "nothing stored", "some examples stored", "all at once")
    rows: Rows = []
    for scenario, trained, results in records:
        found = ((one.first["strategy"], one.final(ACCURACY)) for one in results.each())
        finals = {name: own for name, own in found if own is not None and isfinite(own.mean)}
        cells = [best_of(finals, stores) for stores in (False, True)]
        rows.append([scenario, trained, finals.get(LEAST), *cells, finals.get(MOST)])
    seeds = sorted({len({header["seed"] for header in results.headers}) for *_, results in records})
    shown = table([Column(title) for title in titles], rows)
    nothing = ", *nothing helps*" if "nothing helps" in shown else ""
    return f"{shown}\n\n{SCENARIOS_NOTE.format(seeds=' or '.join(map(str, seeds)), nothing=nothing)}"


def best_of(finals: dict[str, Summary], stores: bool) -> str | None:
    """The best strategies that store examples of the past, or that store none, in words; None where there is none."""
    known = {name: own for name, own in finals.items() if name not in BOUNDS and STRATEGIES[name].stores == stores}
    if not known:
        return None
    if LEAST in finals and MOST in finals and finals[MOST].mean - finals[LEAST].mean < ENOUGH:
        return f"{LEAST} is enough"
    order = sorted(known, key=lambda name: -known[name].mean)
    best, ours = known[order[0]], [name for name in order if name.startswith(OURS)]
    alike = [name for name in order if known[name].mean >= best.mean - (best.std or 0)]
    named = [name for name in alike if name not in ours[1:]]
    share = _share(best.mean, finals)
    before = "nothing helps: " if share < NOTHING else "little helps: " if share < LITTLE else ""
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    text = f"{before}{'; '.join(named[:NAMED])}{more} {_number(best, bold=share >= LITTLE)}"
    if not ours or ours[0] in named[:NAMED]:
        return text
    own = known[ours[0]]
    name = f"{OURS} does not:" if _share(own.mean, finals) < NOTHING <= share else ours[0]
    return f"{text}; {name} {_number(own)}"


def _share(accuracy: float, finals: dict[str, Summary]) -> float:
    """How much of the way from Naive to all at once; all of it where a bound is missing or there is no way."""
    if LEAST not in finals or MOST not in finals or finals[MOST].mean <= finals[LEAST].mean:
        return 1.0
    return (accuracy - finals[LEAST].mean) / (finals[MOST].mean - finals[LEAST].mean)


def _number(own: Summary, bold: bool = False) -> str:
    text = f"{own.mean:.3f}" + ("" if own.std is None else f" ± {own.std:.3f}")
    return f"**{text}**" if bold else text


def by_structure(accuracies: Results, prices: Results) -> str:
    """The rows of `structures`, each with its bytes and its accuracy, and the times that `cost` has for its model and
    structure. Structures that were not run, since they do not fit, have their bytes."""
    titles = ("model", "structure", "accuracy", "bytes", "build", "step")
    rows: Rows = []
    for model, part in accuracies.by("model"):
        methods = {one.first["method"]: one for one in part.each()}
        sizes = dict.fromkeys(row["row"] for row in part.select("bytes"))
        own = [name for name in (PLAIN, *sizes, AT_ONCE) if name in methods or name in sizes]
        for place, name in enumerate(own):
            run = methods.get(name)
            size = next((row["value"] for row in part.select("bytes", row=name)), None)
            work = None if run is None else _work(prices, model, run)
            rows.append([
                "" if place else str(model), f"`{name}`" if name in sizes else name,
                None if run is None else run.final(ACCURACY), "" if size is None else _bytes(size),
                *_times(prices, model, work, plain=name == PLAIN),
            ])  # fmt: skip
    commit = next((header["commit"] or "unknown" for header in prices.headers), "unknown")[:7]
    seeds = len({header["seed"] for header in accuracies.headers})
    note = STRUCTURES_NOTE.format(tasks=accuracies.first["tasks"], seeds=seeds, commit=commit)
    return f"{table([Column(title) for title in titles], rows)}\n\n{note}"


def _work(prices: Results, model: str, run: Results) -> str | None:
    """The row of `cost` with the structure of a run: of its own curvature, or of the first that is there."""
    config, structure = prices.config(model), run.config(run.label)
    works = [work for work in config.get("works", ()) if _alike(work["structure"], structure.get("structure"))]
    works.sort(key=lambda work: work["curvature"] != structure.get("curvature"))
    return works[0]["name"] if works else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two recorded structures have the same options, as far as both have them; how sums are kept makes no
    difference for the one past task that these tables have."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return bool(one == other)
    return all(_alike(one[key], other[key]) for key in one.keys() & other.keys() - {"sums"})


def _times(prices: Results, model: str, work: str | None, plain: bool) -> list[Cell]:
    if plain and prices.config(model):
        reference = prices.final("step1/reference", model, row=prices.config(model)["works"][0]["name"])
        return ["", f"{reference.mean:.1f} ms" if reference else None]
    if work is None:
        return [None, None]
    finals: Callable[[str], Any] = lambda metric: prices.final(metric, model, row=work)  # noqa: E731
    epoch, epochs, plain_step, steps = map(finals, ("build/reference", "build/ratio", "step1/reference", "step1/ratio"))
    return [
        f"{epochs.mean * epoch.mean / 1000:.2f} s ({epochs.mean:.1f})" if epoch and epochs else None,
        f"{steps.mean * plain_step.mean:.1f} ms ({steps.mean:.2f})" if plain_step and steps else None,
    ]


def _bytes(size: float) -> str:
    """In the largest unit of which there is one.

    >>> _bytes(3 * 2**20), _bytes(64)
    ('3.0 MiB', '64 B')
    """
    return next((f"{size / unit:,.1f} {name}" for name, unit in UNITS if size >= unit), f"{size:.0f} B")
