"""Units run by an engine: in this process, or in processes beside it; by the workers of a cluster in `cluster`."""

import os
import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from joblib import Parallel, delayed, parallel_config

from benchmarks.harness.experiment import Unit
from benchmarks.harness.store import write_atomically
from benchmarks.harness.unit_run import Job, Outcome, run_in_worker, run_unit


@dataclass(frozen=True)
class Lost:
    """A unit whose process died, or was ended because another one died, with what is known of the reason."""

    unit: Unit
    reason: str


Ends: TypeAlias = Generator[Outcome | Lost, None, None]


class Engine(ABC):
    """Where units run."""

    @property
    @abstractmethod
    def jobs(self) -> int | None:
        """How many units run side by side; None where that is not decided here."""

    def check(self) -> None:
        """Raise `UsageError` with the remedy where the engine cannot work. Called before the first unit."""
        return None

    @abstractmethod
    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        """The end of each unit, in the order in which they end. After a lost one, units that have not begun may be
        left out. Closing the generator ends the units that are running."""


@dataclass(frozen=True)
class ThisProcess(Engine):
    """One unit after the other, here."""

    @property
    def jobs(self) -> int:
        return 1

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        yield from (run_unit(job, unit) for unit in units)


@dataclass(frozen=True)
class Processes(Engine):
    """At least two processes, with one thread each.

    The pool ends as a whole when one of its processes dies. The units that had begun and not finished are lost then.
    """

    count: int

    @property
    def jobs(self) -> int:
        return self.count

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        begun: dict[str, Unit] = {}
        try:
            with closing(self._results(job, units, begun)) as outcomes:
                for outcome in outcomes:
                    del begun[outcome.unit.digest]
                    yield outcome
        except BrokenProcessPool as error:
            for unit in begun.values():
                finished = job.store.finished(unit.digest)  # joblib drops the results it has not handed out
                yield Outcome(unit) if finished else Lost(unit, _reason(error))

    def _results(self, job: Job, units: Sequence[Unit], begun: dict[str, Unit]) -> Generator[Outcome, None, None]:
        def calls() -> Iterator[Any]:
            for unit in units:
                begun[unit.digest] = unit
                yield delayed(run_in_worker)(job, unit)

        count = max(2, min(self.count, len(units)))  # with one, joblib would run the unit in this process
        with parallel_config("loky", inner_max_num_threads=1, initializer=_attend, initargs=(os.getpid(),)):
            pool = Parallel(count, batch_size=1, pre_dispatch=count, max_nbytes=None, return_as="generator_unordered")
        with _ignoring_interrupt():  # as the processes do that start here
            results = pool(calls())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # one that a unit has left large
            warnings.filterwarnings("ignore", ".*tasks which were still being processed")  # when closed before its end
            with closing(results):
                yield from results


def _attend(parent: int) -> None:
    """Begin a worker process: it leaves Ctrl-C to its parent, and ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@contextmanager
def _ignoring_interrupt() -> Iterator[None]:
    """Processes started here ignore Ctrl-C, which a terminal sends to all: the parent answers it and ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(error: BrokenProcessPool) -> str:
    codes = str(error).rpartition("The exit codes of the workers are ")[2]
    return f"exit code {codes.strip('{} .')}; a kill may mean that the memory was used up"


def run_units(job: Job, units: Sequence[Unit], engine: Engine) -> Generator[Outcome, None, None]:
    """One outcome of each unit, as they end.

    The units that are lost when a process dies run again at the end, one at a time, so that none answers for another:
    one that is lost while it runs alone has failed.
    """
    waiting, suspects = list(units), list[Unit]()
    while waiting:
        ended = set()
        with closing(engine.ends(job, waiting)) as ends:
            for end in ends:
                ended.add(end.unit.digest)
                if isinstance(end, Outcome):
                    yield end
                else:
                    suspects.append(end.unit)
        waiting = [unit for unit in waiting if unit.digest not in ended]
    for unit in suspects:
        with closing(engine.ends(job, [unit])) as ends:
            yield from (end if isinstance(end, Outcome) else _failed(job, end) for end in ends)


def _failed(job: Job, lost: Lost) -> Outcome:
    error = f"the worker process died twice, the second time with no other unit beside it ({lost.reason})"
    write_atomically(job.store.error(lost.unit.digest), error + "\n")
    return Outcome(lost.unit, error)
