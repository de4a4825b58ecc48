"""Signals: at SIGQUIT (Ctrl-\\, or ``kill -QUIT PID``) a run and its workers write to stderr what each of their threads
is doing, and go on; Ctrl-C is left to the run, which ends its workers."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

UNIX = hasattr(signal, "SIGQUIT")
STDERR = 2
APART = 0.1  # seconds between the stacks of two processes, so that their lines do not mix


@contextmanager
def showing_stacks(workers: Callable[[], Iterable[int]] = lambda: ()) -> Iterator[None]:
    """While the context is open, SIGQUIT writes the stacks of this process, even where it hangs outside of Python, and
    has the processes `workers()` write theirs, which have begun by `leave_signals_to_parent` or `starting_workers`."""
    if not UNIX:
        yield
        return

    def ask(*_: object) -> None:
        for worker in workers():
            time.sleep(APART)
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(worker, signal.SIGUSR1)

    before = signal.signal(signal.SIGQUIT, ask)
    faulthandler.register(signal.SIGQUIT, file=STDERR, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGQUIT)
        signal.signal(signal.SIGQUIT, before)


def leave_signals_to_parent() -> None:
    """What a process that runs units for another does: it is deaf to Ctrl-C and SIGQUIT, which a terminal sends to all,
    and writes its stacks at SIGUSR1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if UNIX:
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # a mask would not hold for threads that run by now
        faulthandler.register(signal.SIGUSR1, file=STDERR)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


@contextmanager
def starting_workers() -> Iterator[None]:
    """The processes that start here, also those that keep account of others, are deaf to Ctrl-C, SIGQUIT and SIGUSR1
    until they say otherwise."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGQUIT, signal.SIGUSR1]) if UNIX else set()
    try:
        yield
    finally:
        if UNIX:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        signal.signal(signal.SIGINT, before)
