"""Where units run: in this process, in processes beside it, or on the workers of a Dask cluster."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import psutil
from joblib import Parallel, delayed, parallel_config

from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Unit
from benchmarks.harness.signals import leave_signals_to_parent, showing_stacks, starting_workers
from benchmarks.harness.store import Store, write_atomically
from benchmarks.harness.unit_process import ProcessDied, UnitProcess, unloadable
from benchmarks.harness.unit_run import Job, Outcome, run_in_worker, run_unit
from benchmarks.harness.warned import listen_from_now_on

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT = 10.0  # seconds until a scheduler has to answer
VISIBLE = 30.0  # seconds until the file of a unit that a cluster has run has to be here

_processes: WeakKeyDictionary[Any, UnitProcess] = WeakKeyDictionary()
"""Of each Dask worker in this process, the one that runs its units."""


@dataclass(frozen=True)
class Lost:
    """A unit whose process died, or was ended because another one died, with what is known of the reason."""

    unit: Unit
    reason: str


Ends: TypeAlias = Generator[Outcome | Lost, None, None]


class Engine(ABC):
    """A place that runs units."""

    jobs: int | None
    """How many units run side by side; None where a cluster decides that."""

    def check(self) -> None:
        """Raise `UsageError` with the remedy where the engine cannot work. Called before the first unit."""
        return None

    @abstractmethod
    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        """The end of each unit, in the order in which they end. After a lost one, units that have not begun may be
        left out. Closing the generator ends the units that are running."""


def run_units(job: Job, units: Sequence[Unit], engine: Engine) -> Generator[Outcome, None, None]:
    """One outcome of each unit, as they end.

    The units that are lost when a process dies run again at the end, one at a time, so that none is blamed for another:
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


@dataclass(frozen=True)
class ThisProcess(Engine):
    """One unit after the other, in this process."""

    jobs: int = 1

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        with showing_stacks():
            yield from (run_unit(job, unit) for unit in units)


@dataclass(frozen=True)
class Processes(Engine):
    """At least two processes, with one thread each.

    The pool ends as a whole when one of its processes dies. The units that had begun and not finished are lost then.
    """

    jobs: int

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        begun: dict[str, Unit] = {}
        try:
            with closing(self._outcomes(job, units, begun)) as outcomes:
                for outcome in outcomes:
                    del begun[outcome.unit.digest]
                    yield outcome
        except BrokenProcessPool as error:
            codes = str(error).rpartition("The exit codes of the workers are ")[2]
            reason = f"exit code {codes.strip('{} .')}; a kill may mean that the memory was used up"
            for unit in begun.values():
                finished = job.store.finished(unit.digest)  # joblib drops the results it has not handed out
                yield Outcome(unit) if finished else Lost(unit, reason)

    def _outcomes(self, job: Job, units: Sequence[Unit], begun: dict[str, Unit]) -> Generator[Outcome, None, None]:
        def calls() -> Iterator[Any]:
            for unit in units:
                begun[unit.digest] = unit
                yield delayed(run_in_worker)(job, unit)

        count = max(2, min(self.jobs, len(units)))  # with one, joblib would run the unit in this process
        with parallel_config("loky", inner_max_num_threads=1, initializer=_attend, initargs=(os.getpid(),)):
            pool = Parallel(count, batch_size=1, pre_dispatch=count, max_nbytes=None, return_as="generator_unordered")
        with starting_workers():
            results = pool(calls())
        with showing_stacks(_children), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # one that a unit has left large
            warnings.filterwarnings("ignore", ".*tasks which were still being processed")  # when closed before its end
            with closing(results):
                yield from results


def _attend(parent: int) -> None:
    """Begin a worker process: it leaves signals to its parent, and ends when the parent is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    leave_signals_to_parent()
    listen_from_now_on()
    threading.Thread(target=watch, daemon=True).start()


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children()]


@dataclass(frozen=True)
class Cluster(Engine):
    """The workers of the Dask scheduler at an address, with one thread each, as many as there are at any time.

    Units run in a process beside each worker (`unit_process`), and are lost when that dies.

    The scheduler gives the unit of a worker that died to another one, and gives it up when several have died under it.
    A unit that is running when the engine is closed runs to its end, since the thread that waits for it cannot be
    stopped.
    """

    address: str
    jobs: None = None

    def check(self) -> None:
        with self._client() as client:
            threads = client.nthreads()
        wide = [f"{worker} has {count}" for worker, count in threads.items() if count > 1]
        if wide:
            raise UsageError(
                "a unit takes a CPU and seeds the random states of its process, so a worker has to run them one at a "
                f"time, in a single thread, but {wide[0]}. Start workers with `dask worker ADDRESS --nthreads 1 "
                "--nworkers N`."
            )
        if not threads:
            print(f"no worker has joined {self.address} yet; the units wait for the first", file=sys.stderr)

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        import cloudpickle  # of Dask; it also takes what a script defines
        from distributed import as_completed

        job = job.absolute()  # a worker has a working folder of its own
        with self._client() as client:
            futures = {
                client.submit(_run_if_shared, job.store, cloudpickle.dumps((job, unit)), pure=False): unit
                for unit in units
            }
            try:
                for future in as_completed(futures, loop=client.loop):
                    end = _end(future, futures[future])
                    if isinstance(end, Outcome):
                        _wait_until_visible(job.store, end)
                    yield end
            finally:
                client.cancel(list(futures))

    @contextmanager
    def _client(self) -> Iterator[Client]:
        try:
            from distributed import Client
            from distributed.comm.addressing import resolve_address
        except ImportError:
            raise UsageError("--scheduler needs Dask: python -m pip install -e '.[cluster]'.") from None
        try:
            resolve_address(self.address)  # a client of what is no address would never close
            client = Client(self.address, timeout=CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:  # ValueError: not tcp://HOST:PORT or the like
            raise UsageError(
                f"no Dask scheduler answers at '{self.address}' ({type(error).__name__}). Start one with "
                "`dask scheduler`, and give the address that it prints, such as tcp://10.0.0.1:8786."
            ) from None
        with client:
            yield client


def _end(future: Future, unit: Unit) -> Outcome | Lost:
    """The end of a unit. Raises UsageError where it could not begin, or where the scheduler is gone."""
    from distributed import KilledWorker

    if future.cancelled():
        raise UsageError("the connection to the scheduler was lost. The same command runs the missing units.")
    error = future.exception()
    if isinstance(error, KilledWorker):
        return Lost(unit, f"workers lost: {error.allowed_failures + 1}, the last {error.last_worker.address}")
    if isinstance(error, ProcessDied):
        return Lost(unit, str(error))
    if isinstance(error, UsageError):
        raise error
    if error is not None:
        raise unloadable(error)
    return Outcome(unit, future.result())


def _run_if_shared(store: Store, payload: bytes) -> str | None:
    """Run a pickled (job, unit) in the process beside this worker: the error of its outcome."""
    from distributed import get_worker

    if not store.manifest.exists():
        raise _unshared(store)
    return _processes.setdefault(get_worker(), UnitProcess()).run(payload)


def _wait_until_visible(store: Store, outcome: Outcome) -> None:
    """Wait for the file of a unit, since a network file system may show it to other machines a little late."""
    end = time.monotonic() + VISIBLE
    while outcome.error is None and not store.finished(outcome.unit.digest):
        if time.monotonic() > end:
            raise _unshared(store)
        time.sleep(0.2)


def _unshared(store: Store) -> UsageError:
    return UsageError(
        f"the workers and this process do not see the same files in {store.root}. "
        "Choose a folder on a file system that all machines share: --out DIR."
    )
