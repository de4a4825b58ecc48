"""Which ratios have changed since the last commit of which they are kept, by more than their noise.

pytest-benchmark compares seconds of single functions, and asv, which keeps any number by commit, keeps none of its
spread and finds steps in long series of one machine; these are ratios of works that are timed in turn in one process.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness.published import predecessor
from benchmarks.harness.tables import Cell, Column, table

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

ERRORS = 3  # standard errors: by chance alone one of 400 rows changes by more
LEAST = 0.1  # of a ratio: from process to process it changes by more than its rounds show


def noise(ratios: Sequence[float]) -> float:
    """The standard error of the median of n ratios, relative to it: 1.858 MAD / √n, with MAD the median of the
    distances |ln r_i − ln r| to the median r.

    The median of n normal values has the error √(π/2) σ / √n, and 1.4826 MAD is σ. A single round tells nothing: 0.

    >>> round(noise([1.0, math.e, math.e**2, math.e**3]), 3)     # logarithms 0, 1, 2, 3: MAD = 1
    0.929
    """
    logarithms = [math.log(ratio) for ratio in ratios]
    middle = statistics.median(logarithms)
    spread = statistics.median(abs(value - middle) for value in logarithms)
    return math.sqrt(math.pi / 2) * 1.4826 * spread / math.sqrt(len(ratios))


def is_beyond(before: float, after: float, *noises: float) -> bool:
    """Whether a ratio has changed: |ln after / before| > max(ln 1.1, 3 √(Σ noise²)), with the noise of both.

    >>> is_beyond(2.0, 2.3, 0.01, 0.01), is_beyond(2.0, 2.1, 0.001, 0.001), is_beyond(2.0, 2.3, 0.1, 0.0)
    (True, False, False)
    """
    return abs(math.log(after / before)) > max(math.log1p(LEAST), ERRORS * math.hypot(*noises))


def since_the_last(results: Results, titles: Mapping[str, str]) -> str:
    """A section on the rows that are slower or faster than in the results of the commit before, slowest first."""
    found = predecessor(results)
    if found is None:
        return (
            "## Slower and faster\n\nNo earlier commit is kept to compare with. To keep this one: "
            "`python -m benchmarks publish FOLDER --history`."
        )
    name, last = found
    changes: list[tuple[float, list[Cell]]] = []
    both = 0
    for work, title in titles.items():
        before, after = (some.final(f"{work}/ratio") for some in (last, results))
        if before is None or after is None:
            continue
        both += 1
        noises = [one.mean for some in (last, results) if (one := some.final(f"{work}/noise"))]
        if is_beyond(before.mean, after.mean, *noises):
            change = after.mean / before.mean
            verdict = "**slower**" if change > 1 else "faster"
            changes.append((change, [title, before.mean, after.mean, f"{100 * (change - 1):+.0f} %", verdict]))
    rows = [row for _, row in sorted(changes, key=lambda pair: -pair[0])]
    columns = [Column("work"), Column("before", 2), Column("now", 2), Column("change"), Column("verdict")]
    rule = f"by more than {100 * LEAST:.0f} % and {ERRORS} standard errors of both medians"
    told = f"Of {both} ratios that both have, {len(rows) or 'none'} changed {rule}.{_other_machine(results, last)}"
    return "\n\n".join([f"## Slower and faster than {name}", told, *[table(columns, rows)] * bool(rows)])


def _other_machine(results: Results, last: Results) -> str:
    """What else is not the same, in a sentence."""
    names = {"processor": lambda some: some.manifest.get("device", {}).get("cpu"),
             "torch": lambda some: some.manifest.get("torch")}  # fmt: skip
    pairs = [(what, value(last), value(results)) for what, value in names.items()]
    differing = [f"{what} {before}, now {after}" for what, before, after in pairs if before != after]
    return f" These may come of what else differs: {'; '.join(differing)}." if differing else ""
