"""The command line: ``list``, ``run``, ``report``, and the commands of `documents`."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.harness.arguments import Parser, folder, one_of, positive
from benchmarks.harness.documents import add_commands, report_all
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Experiment, Options
from benchmarks.harness.manifest import cpus
from benchmarks.harness.pool import Engine, ThisProcess
from benchmarks.harness.registered import Registered, load
from benchmarks.harness.report import where, write_report
from benchmarks.harness.results import load as load_results
from benchmarks.harness.store import Store
from benchmarks.registry import EXPERIMENTS

PROGRAM = "python -m benchmarks"
NAMING = (["run"], ["report"])
"""The commands that take an experiment's name, and then its own arguments."""


def main(argv: Sequence[str] | None = None, experiments: Mapping[str, Registered] = EXPERIMENTS) -> int:
    """Run a command line and return its exit status: 0, 1 where units failed, 2 for a wrong request, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        named = next((word for word in words[1:] if word in experiments), None) if words[:1] in NAMING else None
        experiment = load(named, experiments) if named else None
        chosen = parser(experiments, experiment).parse_args(words)
        if chosen.command == "list":
            return list_experiments(experiments)
        if hasattr(chosen, "act"):
            return chosen.act(chosen, experiments)
        if experiment is None or chosen.name is None:
            return report_all(chosen.out, experiments)
        if chosen.name != experiment.name:  # an option's value was another experiment's name
            experiment = load(chosen.name, experiments)
            chosen = parser(experiments, experiment).parse_args(words)
        options = read_options(experiment, chosen)
        store = Store(chosen.out / folder_name(experiment, options))
        if chosen.command == "report":
            return report(experiment, store, words)
        from benchmarks.harness.run import run  # it needs torch

        return run(experiment, options, store, engine(chosen), f"{PROGRAM} {shlex.join(words)}")
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before any unit has started, or after the last
        return 130


def parser(experiments: Mapping[str, Registered], experiment: Experiment | None) -> Parser:
    """The parser, with the arguments of the experiment that the command line names."""
    top = Parser(prog=PROGRAM, description="Run the experiments and report on them.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="{list,run,report,diff,publish,readme}")
    commands.add_parser("list", help="name the experiments", allow_abbrev=False)
    runs = commands.add_parser("run", help="run what is missing, then report", allow_abbrev=False)
    reports = commands.add_parser("report", help="write the report again, without running", allow_abbrev=False)
    add_commands(commands)
    name = one_of("experiment", experiments)
    runs.add_argument("name", metavar="NAME", type=name, help="one of `list`")
    reports.add_argument("name", metavar="NAME", nargs="?", type=name, help="one of `list`; without it, all in --out")
    for command in (runs, reports):
        command.add_argument("--seeds", type=positive, default=5, help="run seeds 0 to SEEDS - 1 (default %(default)s)")
        command.add_argument("--quick", action="store_true", help="a small version that ends in a minute or so")
        command.add_argument("--dataset-root", type=folder, metavar="DIR", help="where data sets are")
        command.add_argument("--out", type=folder, default=Path("results"), metavar="DIR", help="default: results")
        if experiment is not None:
            experiment.add_arguments(command)
    engines = runs.add_mutually_exclusive_group()
    engines.add_argument("--jobs", type=positive, metavar="N", help="units side by side; default one per CPU")
    engines.add_argument(
        "--scheduler", metavar="ADDRESS", help="run the units on the workers of this Dask scheduler: tcp://HOST:PORT"
    )
    return top


def read_options(experiment: Experiment, chosen: argparse.Namespace) -> Options:
    """The options of an experiment, each from the argument of its name."""
    return experiment.options_type(**{f.name: getattr(chosen, f.name) for f in fields(experiment.options_type)})


def engine(chosen: argparse.Namespace) -> Engine:
    """Where the units run: on a cluster, in this process, or in several."""
    if chosen.scheduler:
        from benchmarks.harness.cluster import Cluster

        return Cluster(chosen.scheduler)
    from benchmarks.harness.processes import Processes

    jobs = chosen.jobs or cpus()
    return ThisProcess() if jobs == 1 else Processes(jobs)


def folder_name(experiment: Experiment, options: Options) -> str:
    """The results folder. A quick run has its own, so that it never replaces what a full one has left."""
    parts = [experiment.name, experiment.variant(options), "quick" if options.quick else ""]
    return "-".join(part for part in parts if part)


def list_experiments(experiments: Mapping[str, Registered]) -> int:
    width = max(map(len, experiments))
    for name, entry in sorted(experiments.items()):
        print(f"{name:{width}}  {entry.summary}")
    return 0


def report(experiment: Experiment, store: Store, words: Sequence[str]) -> int:
    """Write the report of the grid that ran last in the folder."""
    results = load_results(store, f"{PROGRAM} {shlex.join(['run', *words[1:]])}")
    if results.missing:
        print(f"{results.missing} of {len(results.manifest['units'])} units are missing.", file=sys.stderr)
    print(write_report(experiment, results, store))
    print(f"\n{where(store)}")
    return 0
