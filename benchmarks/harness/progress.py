"""How far a run is: a bar in a terminal, elsewhere a line every ten seconds at most."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from benchmarks.harness.terminal import shortened

EVERY = 10.0  # seconds between lines
NAME = 30  # characters
BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} units, {elapsed}<{remaining}{postfix}"


class Progress:
    """So many units of a total, of which `done` had finished before, on stderr; a context that ends the bar.

    Until the first unit ends it says that workers start, since there is nothing to count. `jobs` is None where a
    cluster decides how many there are.
    """

    def __init__(self, total: int, done: int, jobs: int | None) -> None:
        self._total, self._before, self._done = total, done, done
        self._begin = self._said = time.monotonic()
        self._bar: Any = None
        if done == total:
            return
        workers = f"{jobs} workers" if jobs and jobs > 1 else "workers" if jobs is None else ""
        start = f"starting {workers}".strip() + f" for {total - done} units"
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, smoothing=0.0, miniters=1, bar_format=start)
        else:
            print(start, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def ended(self, name: str, *, failed: bool) -> None:
        """One more unit has ended, of this name."""
        self._done += 1
        if self._bar is not None and self._done == self._before + 1:  # the time left does not count the start
            self._bar.bar_format = BAR
            self._bar.initial += 1
            self._bar.unpause()
        name = f"{shortened(name, NAME)}{' FAILED' if failed else ''}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name:{NAME}}", refresh=False)
            self._bar.update()
        elif self._done == self._total or time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            spent = self._said - self._begin
            left = spent / (self._done - self._before) * (self._total - self._done)
            ends = f"{_clock(left)} left" if left else f"in {_clock(spent)}"
            print(f"{self._done} of {self._total} units, {ends}: {name}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
