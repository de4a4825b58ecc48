"""Units run side by side in spawned processes.

Not `concurrent.futures`, whose pool gives up all units when one process dies (as one does that runs out of memory):
here the unit of the dead process fails, a new process takes its place, and the others go on.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import TypeAlias, cast

from benchmarks.harness.grid import Unit
from benchmarks.harness.store import write_atomically
from benchmarks.harness.unit_run import Job, Outcome, run_unit, use_one_thread

GRACE = 2.0

Outcomes: TypeAlias = Generator[Outcome, None, None]


def run_units(job: Job, units: Sequence[Unit], workers: int, idle: Callable[[], None]) -> Outcomes:
    """The outcome of each unit as it ends. One worker is this process itself; `idle` is called while others work."""
    if workers == 1:
        yield from (run_unit(job, unit) for unit in units)
    else:
        yield from _run_in_processes(job, deque(units), min(workers, len(units)), idle)


def _run_in_processes(job: Job, queue: deque[Unit], count: int, idle: Callable[[], None]) -> Outcomes:
    busy: dict[Connection, Worker] = {}
    try:
        for _ in range(count):
            worker = Worker(job, queue.popleft())
            busy[worker.connection] = worker
        while busy:
            ready = wait(list(busy), timeout=1.0)
            if not ready:
                idle()
            for connection in cast(list[Connection], ready):
                worker = busy.pop(connection)
                outcome = worker.outcome(job)
                if queue:
                    worker = worker.next(job, queue.popleft())
                    busy[worker.connection] = worker
                else:
                    worker.finish()
                yield outcome
    finally:
        for worker in busy.values():
            worker.process.terminate()
        for worker in busy.values():
            worker.process.join(GRACE)
            worker.process.kill()


class Worker:
    """A spawned process and the unit that it is running."""

    def __init__(self, job: Job, unit: Unit) -> None:
        spawn = get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, job))
        with _ignoring_interrupt():
            self.process.start()
        theirs.close()
        self._give(unit)

    def outcome(self, job: Job) -> Outcome:
        """What the process answered about its unit; that the unit failed, where the process died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            error = f"the worker process died, exit code {self.process.exitcode} (-9: killed, perhaps out of memory)"
            write_atomically(job.store.error(self.unit.digest), error + "\n")
            return Outcome(self.unit, error)

    def next(self, job: Job, unit: Unit) -> "Worker":
        """This worker, or a new one where it died, at work on the unit."""
        if not self.process.is_alive():
            return Worker(job, unit)
        self._give(unit)
        return self

    def finish(self) -> None:
        """Let the process end by itself."""
        self.connection.close()
        self.process.join(GRACE)
        self.process.terminate()

    def _give(self, unit: Unit) -> None:
        self.unit = unit
        with suppress(OSError):  # a process that has died says so when its outcome is asked for
            self.connection.send(unit)


def serve(connection: Connection, job: Job) -> None:
    """The worker's side: run the units that come, until there are no more or the parent is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    use_one_thread()
    with suppress(EOFError, ConnectionError):
        while True:
            connection.send(run_unit(job, connection.recv()))


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _ignoring_interrupt() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, which a terminal sends to all: the parent answers it and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
