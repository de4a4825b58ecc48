"""The command ``run``: the missing units, the manifest as they end, and the report."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.harness.board import options as board_options
from benchmarks.harness.engines import Engine, run_units
from benchmarks.harness.errors import telling_of_a_full_disk
from benchmarks.harness.experiment import Experiment, Unit, grid, in_running_order
from benchmarks.harness.manifest import Manifest
from benchmarks.harness.options import Options
from benchmarks.harness.report import where, write_report
from benchmarks.harness.results import Results, load
from benchmarks.harness.store import Store, only_run_in
from benchmarks.harness.unit_run import Job, Outcome, use_one_thread

INTERVAL = 10.0


@dataclass(frozen=True)
class Runner:
    """Runs experiments below the folder `out`, and reports on them with `report(name)`. `command` is what the user
    gave."""

    out: Path
    engine: Engine
    report: Callable[[str], Callable[[Results, Path], str]]
    command: str

    def run(self, experiment: Experiment, options: Options) -> int:
        """Run the prerequisite of the experiment, then the units that have not finished, and report on all. Returns the
        exit status."""
        use_one_thread()
        store = Store(self.out / experiment.folder(options))
        with telling_of_a_full_disk(store.root), only_run_in(store.root):
            before = experiment.prerequisite(options)
            if before is None:
                return self._run_grid(experiment, options, store)
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
        units = grid(experiment, options)
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
            return 1
        print(write_report(self.report(experiment.name), load(store, self.command), store))
        print(f"\n{where(store)}")
        return 1 if failed else 0

    def _run_missing(self, job: Job, manifest: Manifest, units: list[Unit], missing: list[Unit]) -> list[Outcome]:
        """Run the missing units; returns the outcomes of those that failed."""
        begin = time.perf_counter()
        failed = []
        manifest.write(0.0)
        with (
            Progress(len(units), len(units) - len(missing)) as progress,
            closing(run_units(job, missing, self.engine)) as outcomes,  # closing it ends the workers
        ):
            for outcome in outcomes:
                manifest.finished(outcome.unit)
                manifest.write(time.perf_counter() - begin)
                if outcome.error:
                    failed.append(outcome)
                progress.advance(f"{outcome.unit.label} seed {outcome.unit.seed}{' FAILED' if outcome.error else ''}")
        return failed


class Progress:
    """Units done and the time left while the context is open: a bar on a terminal, elsewhere a line every ten seconds
    at most."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="unit",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.0,
        )
        self._total, self._start, self._done = total, done, done
        self._begin = time.monotonic()
        self._spoke = self._begin
        self._last = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pass_time, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()

    def advance(self, last: str) -> None:
        """One more unit has ended; `last` names it."""
        self._done += 1
        self._last = last
        self._bar.set_postfix_str(last, refresh=False)
        self._bar.update()
        self._show(speak=self._done == self._total)

    def _pass_time(self) -> None:
        while not self._stop.wait(1.0):
            self._show()

    def _show(self, speak: bool = False) -> None:
        """The time that has passed, whether or not a unit has ended."""
        self._bar.refresh()
        now = time.monotonic()
        if self._bar.disable and (speak or now - self._spoke >= INTERVAL):
            self._spoke = now
            print(self._line(now - self._begin), file=sys.stderr, flush=True)

    def _line(self, elapsed: float) -> str:
        line = f"{self._done}/{self._total} units, {tqdm.format_interval(elapsed)} elapsed"
        if self._done > self._start:
            left = elapsed / (self._done - self._start) * (self._total - self._done)
            line += f", {tqdm.format_interval(left)} left, last: {self._last}"
        return line


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
