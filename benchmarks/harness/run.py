"""The command ``run``: the missing units, the manifest as they end, and the report."""

import sys
import time
from contextlib import closing

from benchmarks.harness.board import columns
from benchmarks.harness.experiment import Experiment, Options
from benchmarks.harness.grid import Unit, grid, in_running_order
from benchmarks.harness.manifest import Manifest, cpus
from benchmarks.harness.pool import run_units, use_one_thread
from benchmarks.harness.progress import Progress
from benchmarks.harness.report import where, write_report
from benchmarks.harness.results import load
from benchmarks.harness.store import Store
from benchmarks.harness.unit_run import Job, Outcome


def run(experiment: Experiment, options: Options, store: Store, workers: int | None, command: str) -> int:
    """Run the units that have not finished, then report on all. Returns the exit status."""
    use_one_thread()
    units = grid(experiment, options)
    missing = in_running_order([unit for unit in units if not store.finished(unit.digest)])
    if len(missing) < len(units):
        _say(f"{len(units) - len(missing)} of {len(units)} units already finished.")
    count = min(workers or cpus(), max(1, len(missing)))
    manifest = Manifest(store, units, options, command, count)
    job = Job(experiment, store, options.dataset_root, manifest.commit, columns(units))
    try:
        failed = run_missing(job, manifest, units, missing, count)
    except KeyboardInterrupt:
        done = sum(store.finished(unit.digest) for unit in units)
        _say(f"\nStopped with {done} of {len(units)} units finished. The same command resumes: {command}")
        return 130
    _say_failures(failed, store)
    if len(failed) == len(units):
        return 1
    print(write_report(experiment, load(store, command), store))
    print(f"\n{where(store)}")
    return 1 if failed else 0


def run_missing(job: Job, manifest: Manifest, units: list[Unit], missing: list[Unit], workers: int) -> list[Outcome]:
    """Run the missing units; the outcomes of those that failed."""
    begin = time.perf_counter()
    failed = []
    manifest.write(0.0)
    progress = Progress(len(units), len(units) - len(missing))
    try:
        with closing(run_units(job, missing, workers, progress.tick)) as outcomes:  # closing it ends the workers
            for outcome in outcomes:
                manifest.finished(outcome.unit)
                manifest.write(time.perf_counter() - begin)
                if outcome.error:
                    failed.append(outcome)
                progress.advance(f"{outcome.unit.label} seed {outcome.unit.seed}{' FAILED' if outcome.error else ''}")
    finally:
        progress.close()
    return failed


def _say_failures(failed: list[Outcome], store: Store) -> None:
    if failed:
        _say(f"\n{len(failed)} units failed; the same command runs them again:")
    for outcome in failed:
        place = store.error(outcome.unit.digest)
        _say(f"  {outcome.unit.label} seed {outcome.unit.seed}: {outcome.error}\n    {place}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
