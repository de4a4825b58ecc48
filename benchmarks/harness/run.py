"""The command ``run``: the missing units, the manifest as they end, and the report."""

import sys
import time
from contextlib import closing

from benchmarks.harness.board import columns
from benchmarks.harness.command import folder_name
from benchmarks.harness.errors import telling_of_a_full_disk
from benchmarks.harness.experiment import Experiment, Options
from benchmarks.harness.grid import Unit, grid, in_running_order
from benchmarks.harness.lock import only_run_in
from benchmarks.harness.manifest import Manifest
from benchmarks.harness.pool import Engine, run_units
from benchmarks.harness.progress import Progress
from benchmarks.harness.report import where, write_report
from benchmarks.harness.results import load
from benchmarks.harness.store import Store
from benchmarks.harness.unit_run import Job, Outcome, use_one_thread


def run(experiment: Experiment, options: Options, store: Store, engine: Engine, command: str) -> int:
    """Run the prerequisite of the experiment, then the units that have not finished, and report on all. Returns the
    exit status."""
    use_one_thread()
    with telling_of_a_full_disk(store.root), only_run_in(store.root):
        return run_stages(experiment, options, store, engine, command)


def run_stages(experiment: Experiment, options: Options, store: Store, engine: Engine, command: str) -> int:
    """The same in a folder that no other run is in. That of the prerequisite is kept until its results are read."""
    before = experiment.prerequisite(options)
    if before is not None:
        first, its_options = before
        its_store = Store(store.root.parent / folder_name(first, its_options))
        _say(f"'{experiment.name}' needs the results of '{first.name}', in {its_store.root}.")
        with only_run_in(its_store.root):
            status = run_stages(first, its_options, its_store, engine, command)
            if status:
                _say(f"'{experiment.name}' has not begun, because '{first.name}' has not finished.")
                return status
            options = experiment.settled(options, load(its_store, command))
    return run_grid(experiment, options, store, engine, command)


def run_grid(experiment: Experiment, options: Options, store: Store, engine: Engine, command: str) -> int:
    """The units of the experiment alone, and the report. Returns the exit status."""
    units = grid(experiment, options)
    missing = in_running_order([unit for unit in units if not store.finished(unit.digest)])
    if len(missing) < len(units):
        _say(f"{len(units) - len(missing)} of {len(units)} units already finished.")
    if missing:
        engine.check()
    manifest = Manifest(store, units, options, command, engine.jobs)
    job = Job(experiment, store, options.dataset_root, manifest.commit, columns(units))
    try:
        failed = run_missing(job, manifest, units, missing, engine)
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


def run_missing(job: Job, manifest: Manifest, units: list[Unit], missing: list[Unit], engine: Engine) -> list[Outcome]:
    """Run the missing units; the outcomes of those that failed."""
    begin = time.perf_counter()
    failed = []
    manifest.write(0.0)
    with (
        Progress(len(units), len(units) - len(missing)) as progress,
        closing(run_units(job, missing, engine)) as outcomes,  # closing it ends the workers
    ):
        for outcome in outcomes:
            manifest.finished(outcome.unit)
            manifest.write(time.perf_counter() - begin)
            if outcome.error:
                failed.append(outcome)
            progress.advance(f"{outcome.unit.label} seed {outcome.unit.seed}{' FAILED' if outcome.error else ''}")
    return failed


def _say_failures(failed: list[Outcome], store: Store) -> None:
    if failed:
        _say(f"\n{len(failed)} units failed; the same command runs them again:")
    for outcome in failed:
        place = store.error(outcome.unit.digest)
        _say(f"  {outcome.unit.label} seed {outcome.unit.seed}: {outcome.error}\n    {place}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
