"""Units run by the workers of a Dask scheduler, through its client."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.harness.engines import Ends, Engine, Lost
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Unit
from benchmarks.harness.store import Store
from benchmarks.harness.unit_run import Job, Outcome, run_in_worker

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT = 10.0
VISIBLE = 30.0


@dataclass(frozen=True)
class Cluster(Engine):
    """The workers of the Dask scheduler at an address, with one thread each, as many as there are at any time.

    The scheduler gives the unit of a worker that died to another one, and gives it up when several have died under it.
    What a worker is running when the engine is closed it still ends, since a thread cannot be killed.
    """

    address: str

    @property
    def jobs(self) -> None:
        return None

    def check(self) -> None:
        with self._client() as client:
            threads = client.nthreads()
        wide = [f"{worker} has {count}" for worker, count in threads.items() if count > 1]
        if wide:
            raise UsageError(
                "units seed the random states of their process, so a worker has to run them one at a time, in a single "
                f"thread, but {wide[0]}. Start workers with `dask worker ADDRESS --nthreads 1 --nworkers N`."
            )
        if not threads:
            print(f"no worker has joined {self.address} yet; the units wait for the first", file=sys.stderr)

    def ends(self, job: Job, units: Sequence[Unit]) -> Ends:
        from distributed import as_completed

        job = job.absolute()  # a worker has a working folder of its own
        with self._client() as client:
            futures = {client.submit(_run_if_shared, job, unit, pure=False): unit for unit in units}
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
    if isinstance(error, UsageError):
        raise error
    if error is not None:
        raise UsageError(
            f"a worker could not load a unit ({type(error).__name__}: {error}). Start the workers in the same Python "
            "environment, with the checkout's folder as their working folder or in PYTHONPATH, and again when code "
            "changes."
        )
    return future.result()


def _run_if_shared(job: Job, unit: Unit) -> Outcome:
    if not job.store.manifest.exists():
        raise _unshared(job.store)
    return run_in_worker(job, unit)


def _wait_until_visible(store: Store, outcome: Outcome) -> None:
    """A network file system may show a file to other machines a little late."""
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
