"""How far a run is, on stderr."""

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

INTERVAL = 10.0


class Progress:
    """Units done and the time left while the context is open: a bar on a terminal, elsewhere a line every ten seconds
    at most."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="unit",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.0,
        )
        self._total, self._start, self._done = total, done, done
        self._begin = time.monotonic()
        self._spoke = self._begin
        self._last = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pass_time, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()

    def advance(self, last: str) -> None:
        """One more unit has ended; `last` names it."""
        self._done += 1
        self._last = last
        self._bar.set_postfix_str(last, refresh=False)
        self._bar.update()
        self._show(speak=self._done == self._total)

    def _pass_time(self) -> None:
        while not self._stop.wait(1.0):
            self._show()

    def _show(self, speak: bool = False) -> None:
        """The time that has passed, whether or not a unit has ended."""
        self._bar.refresh()
        now = time.monotonic()
        if self._bar.disable and (speak or now - self._spoke >= INTERVAL):
            self._spoke = now
            print(self._line(now - self._begin), file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        line = f"{self._done}/{self._total} units, {tqdm.format_interval(elapsed)} elapsed"
        if self._done > self._start:
            left = elapsed / (self._done - self._start) * (self._total - self._done)
            line += f", {tqdm.format_interval(left)} left, last: {self._last}"
        return line
