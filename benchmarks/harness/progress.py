"""How far a run is: a bar in a terminal, elsewhere a line every ten seconds at most."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from benchmarks.harness.terminal import shortened

EVERY = 10.0  # seconds between lines
LABEL = 24  # characters
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
        workers = "" if jobs == 1 else f"{jobs or 'the'} workers for "
        start = f"starting {workers}{total - done} units"
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, smoothing=0.0, miniters=1, bar_format=start)
        else:
            print(start, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def ended(self, label: str, seed: int, *, failed: bool) -> None:
        """One more unit has ended."""
        self._done += 1
        if self._done == self._before + 1:
            self._first_ended()
        name = f"{shortened(label, LABEL)} seed {seed}{' FAILED' if failed else ''}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name:{LABEL + len(' seed 0')}}", refresh=False)
            self._bar.update()
        elif self._done == self._total or time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            print(f"{self._done} of {self._total} units{self._left()}: {name}", file=sys.stderr, flush=True)

    def _first_ended(self) -> None:
        """From here on time counts: before, workers started."""
        self._begin = time.monotonic()
        if self._bar is not None:
            self._bar.bar_format = BAR
            self._bar.initial += 1
            self._bar.unpause()

    def _left(self) -> str:
        """The time that is left, in words, where it can be known."""
        counted, left = self._done - self._before - 1, self._total - self._done
        return f", {_clock((self._said - self._begin) / counted * left)} left" if counted and left else ""


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
