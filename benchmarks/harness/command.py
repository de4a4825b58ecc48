"""The command line: ``python -m benchmarks list | run | report | diff | publish | readme``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import tyro

from benchmarks.harness.errors import UsageError, unknown
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.options import Options, folder, parsed, positive
from benchmarks.registry import EXPERIMENTS, Registered, found

if TYPE_CHECKING:
    from benchmarks.harness.results import Results

PROGRAM = "python -m benchmarks"
HELP = ("-h", "--help")
Experiments = Mapping[str, Registered]
O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass(frozen=True)
class Place(Generic[O]):
    """Write the report on results again, without running. Files that cannot be read are named and left out, and the
    status is then 1."""

    options: Annotated[O, tyro.conf.arg(name="experiment")]
    out: Annotated[Path, folder()] = Path("results")
    """below it lie the results, in a folder for each experiment"""


@dataclass(frozen=True)
class Run(Place[O]):
    """Run the units that have not finished, then report on all."""

    jobs: Annotated[int | None, positive()] = None
    """units side by side; default one per CPU"""
    scheduler: str | None = None
    """run the units on the workers of this Dask scheduler: tcp://HOST:PORT"""


@dataclass(frozen=True)
class Reports:
    """Write each report below a folder again, without running, and one page of all. Files that cannot be read are named
    and left out, and the status is then 1."""

    out: Annotated[Path, folder()] = Path("results")
    """the folder of the results"""


@dataclass(frozen=True)
class Diff:
    """What changed from one results folder to another, and whether it is noise. Files that cannot be read are named and
    left out, and the status is then 1."""

    a: tyro.conf.Positional[Path]
    """a results folder, or a published file"""
    b: tyro.conf.Positional[Path]
    """another"""
    metric: tuple[str, ...] = ()
    """only this one; repeatable"""
    html: Path | None = None
    """also write a page"""


@dataclass(frozen=True)
class Publish:
    """Keep what the documents' tables need of results, in the folder of their experiment."""

    folder: tyro.conf.Positional[Annotated[Path, folder()]]
    """a results folder"""
    name: Annotated[str | None, tyro.conf.arg(name="as")] = None
    """default: the name of the folder"""
    figure: tuple[str, ...] = ()
    """keep this file of the folder too; repeatable"""
    history: bool = False
    """keep them beside those of earlier commits, in a file named by date and commit"""


@dataclass(frozen=True)
class Readme:
    """Fill the tables of the documents from published results, by cog."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """default: README.md and those of the package and of the experiments"""
    check: bool = False
    """change nothing; status 1 where one is not current"""


def main(argv: Sequence[str] | None = None, experiments: Experiments = EXPERIMENTS) -> int:
    """Run a command line and return its exit status: 0, 1 where units failed or files could not be read, 2 for a wrong
    request, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"list": _list, "run": _run, "report": _report, "diff": _diff, "publish": _publish, "readme": _readme}
    try:
        if not words or words[0] in HELP:
            print(f"usage: {PROGRAM} {{{','.join(commands)}}} ...\n\nRun the experiments and report on them.")
            return 0 if words else 2
        if words[0] not in commands:
            raise UsageError(unknown("command", words[0], commands))
        return commands[words[0]](words, experiments)
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes when it ends
        return 1
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before any unit has started, or after the last
        return 130


def _list(words: Sequence[str], experiments: Experiments) -> int:
    width = max(map(len, experiments))
    for name, entry in sorted(experiments.items()):
        print(f"{name:{width}}  {entry.summary}")
    return 0


def _run(words: Sequence[str], experiments: Experiments) -> int:
    words = _name_first(words, experiments)
    if len(words) < 2 or words[1] in HELP:
        print(f"usage: {PROGRAM} run NAME [options]: see {PROGRAM} run NAME --help. Names: {', '.join(experiments)}.")
        return 0 if len(words) > 1 else 2
    experiment = found(words[1], experiments).experiment
    chosen = _chosen(Run, experiment, words)
    if chosen.jobs and chosen.scheduler:
        raise UsageError(f"--scheduler and --jobs exclude each other. See {PROGRAM} run {words[1]} --help.")
    experiment.check(chosen.options)
    if sys.stderr.isatty():
        print("loading torch and Avalanche", file=sys.stderr)
    from benchmarks.harness.engines import Cluster, Processes, ThisProcess  # these need torch
    from benchmarks.harness.manifest import cpus
    from benchmarks.harness.run import Runner

    jobs = chosen.jobs or experiment.jobs or cpus()
    engine = Cluster(chosen.scheduler) if chosen.scheduler else ThisProcess() if jobs == 1 else Processes(jobs)
    runner = Runner(chosen.out, engine, lambda name: found(name, experiments), f"{PROGRAM} {shlex.join(words)}")
    return runner.run(experiment, chosen.options)


def _name_first(words: Sequence[str], experiments: Experiments) -> Sequence[str]:
    """The words of a command with the experiment's name before its options. Raises UsageError for options with several
    names behind them, of which some are values."""
    if len(words) < 2 or not words[1].startswith("-") or words[1] in HELP:
        return words
    places = [place for place, word in enumerate(words) if word in experiments]
    if len(places) != 1:
        raise UsageError(f"the name of the experiment comes first: {PROGRAM} {words[0]} NAME {shlex.join(words[1:])}")
    (place,) = places
    return [words[0], words[place], *words[1:place], *words[place + 1 :]]


def _report(words: Sequence[str], experiments: Experiments) -> int:
    from benchmarks.harness.report import where, write_report, write_reports
    from benchmarks.harness.results import load
    from benchmarks.harness.store import Store
    from benchmarks.harness.terminal import show

    try:
        of_all = len(words) < 2 or words[1].startswith("-")
        out = parsed(Reports, words[1:], f"{PROGRAM} report").out if of_all else None
    except UsageError:
        words, out = _name_first(words, experiments), None
    if out is not None:
        written, problems = write_reports(out, lambda name: found(name, experiments).report)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        print(f"{len(written)} reports on one page: {out / 'report.html'}")
        return 1 if problems else 0
    entry = found(words[1], experiments)
    chosen = _chosen(Place, entry.experiment, words)
    store = Store(chosen.out / entry.experiment.folder(chosen.options))
    results = load(store, f"{PROGRAM} {shlex.join(['run', *words[1:]])}")
    of, version = results.manifest["experiment"], results.manifest.get("version", entry.experiment.version)
    if of != entry.experiment.name:
        raise UsageError(f"{store.root} holds results of '{of}', not of '{entry.experiment.name}'.")
    if version != entry.experiment.version:
        print(
            f"{store.root} holds results of version {version} of '{of}', which is at version {entry.experiment.version}"
            " now: its report may not fit them.", file=sys.stderr,
        )  # fmt: skip
    if results.missing:
        print(f"{results.missing} of {len(results.manifest['units'])} units are missing.", file=sys.stderr)
    show(write_report(entry.report, results, store), entry.glance, where(store).splitlines())
    return _left_out(results)


def _left_out(*read: Results) -> int:
    """Name the files that are left out; the exit status."""
    problems = [problem for results in read for problem in results.left_out]
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} files could not be read; all others are in the report.", file=sys.stderr)
    return 1 if problems else 0


def _chosen(kind: Any, experiment: Experiment, words: Sequence[str]) -> Any:
    """The command line of an experiment, as `Run` or `Place` with its options."""
    return parsed(kind[experiment.options_type], words[2:], f"{PROGRAM} {shlex.join(words[:2])}")


def _diff(words: Sequence[str], experiments: Experiments) -> int:
    from benchmarks.harness.difference import between
    from benchmarks.harness.published import read_results

    chosen = parsed(Diff, words[1:], f"{PROGRAM} diff")
    a, b = (read_results(path) for path in (chosen.a, chosen.b))
    markdown = between((chosen.a, a), (chosen.b, b), chosen.metric)
    if chosen.html is not None:
        from benchmarks.harness.report import Part, page
        from benchmarks.harness.store import write_atomically

        title = f"{chosen.a} and {chosen.b}"
        write_atomically(chosen.html, page(title, [Part(title, markdown, None)]))
    print(markdown)
    return _left_out(a, b)


def _publish(words: Sequence[str], experiments: Experiments) -> int:
    from benchmarks.harness.published import publish_folder

    chosen = parsed(Publish, words[1:], f"{PROGRAM} publish")
    for line in publish_folder(chosen.folder, chosen.name, chosen.figure, experiments, history=chosen.history):
        print(line)
    return 0


def _readme(words: Sequence[str], experiments: Experiments) -> int:
    from benchmarks.harness.published import fill

    chosen = parsed(Readme, words[1:], f"{PROGRAM} readme")
    return fill(chosen.files, chosen.check)
