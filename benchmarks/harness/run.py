"""The command ``run``: the missing units, the manifest as they end, and the report."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.board import options as board_options
from benchmarks.harness.board import select, selected
from benchmarks.harness.engines import Engine, run_units
from benchmarks.harness.experiment import Experiment, Unit, grid, in_running_order
from benchmarks.harness.kept import keep_below
from benchmarks.harness.manifest import Manifest
from benchmarks.harness.options import Options
from benchmarks.harness.progress import Progress
from benchmarks.harness.report import where, write_report
from benchmarks.harness.results import load
from benchmarks.harness.store import Store, only_run_in, reporting_a_full_disk
from benchmarks.harness.terminal import show
from benchmarks.harness.unit_run import Job, Outcome, use_one_thread
from benchmarks.harness.warned import Warned, listening, told
from benchmarks.registry import Registered


@dataclass(frozen=True)
class Runner:
    """Runs experiments below the folder `out`, and reports on them as `entry(name)` says. `command` is the user's."""

    out: Path
    engine: Engine
    entry: Callable[[str], Registered]
    command: str

    def run(self, experiment: Experiment, options: Options) -> int:
        """Run the prerequisite of the experiment, then the units that have not finished, and report on all. Returns the
        exit status."""
        use_one_thread()
        keep_below(self.out)
        store = Store(self.out / experiment.folder(options))
        with reporting_a_full_disk(store.root), only_run_in(store.root):
            before = experiment.prerequisite(options)
            if before is not None:
                first, its_options = before
                its_store = Store(self.out / first.folder(its_options))
                _say(f"'{experiment.name}' needs the results of '{first.name}', in {its_store.root}.")
                with only_run_in(its_store.root):  # until its results are read
                    status = self._run_grid(first, its_options, its_store)
                    if status:
                        _say(f"'{experiment.name}' has not begun, because '{first.name}' has not finished.")
                        return status
                    options = experiment.settled(options, load(its_store, self.command))
            return self._run_grid(experiment, options, store)

    def _run_grid(self, experiment: Experiment, options: Options, store: Store) -> int:
        with listening() as heard:
            return self._run_units(experiment, options, store, heard)

    def _run_units(self, experiment: Experiment, options: Options, store: Store, heard: list[Warned]) -> int:
        units = grid(experiment, options)
        for unit in units:
            if problem := store.set_aside_if_broken(unit.digest, unit.label, unit.seed):
                _say(f"{problem}. It is set aside, and its unit runs again.")
        missing = in_running_order([unit for unit in units if not store.finished(unit.digest)])
        if len(missing) < len(units):
            _say(f"{len(units) - len(missing)} of {len(units)} units already finished.")
        if missing:
            self.engine.check()
        manifest = Manifest(store, units, options, self.command, self.engine.jobs)
        job = Job(experiment, store, options.dataset_root, manifest.commit, board_options(units))
        try:
            failed = self._run_missing(job, manifest, units, missing)
        except KeyboardInterrupt:
            done = sum(store.finished(unit.digest) for unit in units)
            _say(f"\nStopped with {done} of {len(units)} units finished. The same command resumes: {self.command}")
            return 130
        if failed:
            _say(f"\n{len(failed)} units failed; the same command runs them again:")
        for outcome in failed:
            unit = outcome.unit
            _say(f"  {unit.label} seed {unit.seed}: {outcome.error}\n    {store.error(unit.digest)}")
        if len(failed) == len(units):
            ours, places = told(store, units, heard)
            _say("\n".join([*ours, *places]))
            return 1
        results, entry = load(store, self.command), self.entry(experiment.name)
        markdown = write_report(entry.report, results, store)
        ours, places = told(store, units, heard)
        show(markdown, entry.glance, [*where(store).splitlines(), *places])
        for text in ours:
            _say(f"warning: {text}")
        for problem in results.left_out:
            _say(f"left out: {problem}")
        return 1 if failed or results.left_out else 0

    def _run_missing(self, job: Job, manifest: Manifest, units: list[Unit], missing: list[Unit]) -> list[Outcome]:
        """Run the missing units; returns the outcomes of those that failed."""
        begin, failed, shown = time.perf_counter(), [], selected(units, job.experiment.shown)
        select(job.store, shown)
        manifest.write(0.0)
        with (
            Progress(len(units), len(units) - len(missing), self.engine.jobs) as progress,
            closing(run_units(job, missing, self.engine)) as outcomes,  # closing it ends the workers
        ):
            for outcome in outcomes:
                unit = outcome.unit
                manifest.update(unit)
                select(job.store, shown)
                manifest.write(time.perf_counter() - begin)
                if outcome.error:
                    failed.append(outcome)
                progress.ended(unit.label, unit.seed, failed=bool(outcome.error))
        return failed


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
