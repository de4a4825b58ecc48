"""One unit in this process, from seeding to its file on disk."""

import gc
import json
import os
import random
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.board import Options, publish
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Context, Experiment, Record, Unit, describe, is_timing
from benchmarks.harness.kept import keep_below
from benchmarks.harness.store import Store, collecting_full_disks, full_disk, reporting_a_full_disk, write_atomically
from benchmarks.harness.warned import before_this, keep, listening

SAMPLED = 0.05  # seconds between two looks at the memory


@dataclass(frozen=True)
class Job:
    """The inputs that all units of one run share."""

    experiment: Experiment
    store: Store
    dataset_root: Path | None
    commit: str | None
    table: Mapping[str, Options]
    """By label: its row in TensorBoard's table of runs."""

    def absolute(self) -> "Job":
        """The job for a process with another working folder."""
        data = self.dataset_root.resolve() if self.dataset_root else None
        return replace(self, store=Store(self.store.root.resolve()), dataset_root=data)


@dataclass(frozen=True)
class Outcome:
    """A unit that ended; `error` is the last line of its traceback, None where it finished."""

    unit: Unit
    error: str | None = None


def run_in_worker(job: Job, unit: Unit) -> Outcome:
    """`run_unit` for a process that is not the parent. None that has finished, since a scheduler asks again when the
    worker dies that holds the outcome."""
    use_one_thread()
    keep_below(job.store.root.parent)
    return Outcome(unit) if job.store.finished(unit.digest) else run_unit(job, unit)


def run_unit(job: Job, unit: Unit) -> Outcome:
    """Run a unit and write its file, or its traceback. The file comes last, so whatever is interrupted is run again.

    Raises `UsageError` where the disk is full, since all other units would fail as well.
    """
    with collecting_full_disks(job.store.root) as met, listening() as heard:
        outcome = _attempt(job, unit, met)
        if outcome.error:
            gc.collect()  # closes its loggers, which would print after the error if they closed at exit
        heard += before_this()
    with reporting_a_full_disk(job.store.root):
        keep(job.store, unit.digest, heard)
    if met:
        raise met[0]
    return outcome


def _attempt(job: Job, unit: Unit, met: list[UsageError]) -> Outcome:
    """Run a unit, and write its file unless its events met a full disk; a full disk is added to `met`."""
    store, tensorboard = job.store, job.store.tensorboard(unit.label, unit.seed)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        shutil.rmtree(tensorboard, ignore_errors=True)
        _seed(unit.seed)
        begin = time.perf_counter()
        gc.freeze()  # older objects, which would make the collection below take a second
        try:
            with PeakMemory() as memory:
                context = Context(unit.seed, unit.quick, job.dataset_root, tensorboard)
                records = _checked(job.experiment.run(unit.config, unit.seed, context))
            seconds = time.perf_counter() - begin
            gc.collect()  # closes Avalanche's loggers, so that the events of a finished unit are on disk
        finally:
            gc.unfreeze()
        publish(tensorboard, unit, job.table, records)
        header = {
            "label": unit.label, "seed": unit.seed, "quick": unit.quick, "config": describe(unit.config),
            "seconds": round(seconds, 3), "peak_memory": memory.peak, "started": started, "commit": job.commit,
        }  # fmt: skip
        if not met:
            store.write_unit(unit.digest, header, records)
    except (Exception, SystemExit) as error:  # a unit that ends Python must not end the others
        full = full_disk(error, store.root)
        if full is None:
            write_atomically(store.error(unit.digest), traceback.format_exc())
        else:
            met.append(full)
            error.__traceback__ = None  # TensorBoard's thread keeps the error, and so would keep the logger
        return Outcome(unit, traceback.format_exception_only(error)[-1].strip())
    return Outcome(unit)


def use_one_thread() -> None:
    """Keep this process, and those it starts, to one thread each: units run side by side and sum in a fixed order."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch  # only now, since it reads the variables at import

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of libraries under libraries, once for each unit


def _seed(seed: int) -> None:
    """Seed the global random states, so that a unit gives the same numbers whatever ran before it in the process."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is the one that libraries draw from
    torch.manual_seed(seed)


def _checked(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The records with float values and integer steps, and the timings among them marked; raises for any that JSON or
    a table could not hold."""
    checked = []
    for record in records:
        metric, value, step = record.get("metric"), record.get("value"), record.get("step")
        if not isinstance(metric, str) or value is None:
            raise ValueError(f'A record is {{"metric": str, "value": float, "step": int | None, ...}}, got {record!r}.')
        plain = {**record, "value": float(value), "step": None if step is None else int(step)}
        if is_timing(metric):
            plain["timing"] = True
        json.dumps(plain)
        checked.append(plain)
    return checked


class PeakMemory:
    """The largest resident memory of this process while the context is open, in bytes, as `peak`.

    A thread samples it every 50 ms, since the peak that the system itself counts never falls and so would carry over
    from unit to unit. It includes the interpreter and all libraries (several hundred MB with Avalanche), misses shorter
    spikes, and does not see GPU memory. Compare units of one experiment; do not read it as the memory of a method.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process, ended = psutil.Process(), False
        while not ended:
            ended = self._stop.wait(SAMPLED)
            self.peak = max(self.peak, process.memory_info().rss)
