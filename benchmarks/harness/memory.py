"""The peak memory of a stretch of work."""

import threading
from types import TracebackType

import psutil

INTERVAL = 0.05


class PeakMemory:
    """The largest resident memory of this process while the context is open, in bytes, as `peak`.

    A thread samples it every 50 ms, since the peak that the system itself counts never falls and so would carry over
    from unit to unit. It includes the interpreter and all libraries (several hundred MB with Avalanche), misses shorter
    spikes, and does not see GPU memory. Compare units of one experiment; do not read it as the memory of a method.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)
