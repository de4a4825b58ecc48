"""The commands ``list``, ``run`` and ``report``."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.harness.arguments import Parser, document, folder, one_of, positive
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Experiment, Options
from benchmarks.harness.markers import excerpt, insert
from benchmarks.harness.registered import Registered, load
from benchmarks.harness.report import where, write_report
from benchmarks.harness.results import load as load_results
from benchmarks.harness.store import Store
from benchmarks.registry import EXPERIMENTS

PROGRAM = "python -m benchmarks"


def main(argv: Sequence[str] | None = None, experiments: Mapping[str, Registered] = EXPERIMENTS) -> int:
    """Run a command line and return its exit status: 0, 1 where units failed, 2 for a wrong request, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        named = next((word for word in words[1:] if word in experiments), None)
        experiment = load(named, experiments) if named else None
        chosen = parser(experiments, experiment).parse_args(words)
        if chosen.command == "list" or experiment is None:
            return list_experiments(experiments)
        if chosen.name != experiment.name:  # an option's value was another experiment's name
            experiment = load(chosen.name, experiments)
            chosen = parser(experiments, experiment).parse_args(words)
        options = read_options(experiment, chosen)
        store = Store(chosen.out / folder_name(experiment, options))
        if chosen.command == "report":
            return report(experiment, store, without(words, "--readme"), chosen.readme)
        from benchmarks.harness.run import run  # it needs torch

        return run(experiment, options, store, chosen.workers, f"{PROGRAM} {shlex.join(words)}")
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before any unit has started, or after the last
        return 130


def parser(experiments: Mapping[str, Registered], experiment: Experiment | None) -> Parser:
    """The parser, with the arguments of the experiment that the command line names."""
    top = Parser(prog=PROGRAM, description="Run the experiments and report on them.", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="{list,run,report}")
    commands.add_parser("list", help="name the experiments", allow_abbrev=False)
    runs = commands.add_parser("run", help="run what is missing, then report", allow_abbrev=False)
    reports = commands.add_parser("report", help="write the report again, without running", allow_abbrev=False)
    for command in (runs, reports):
        command.add_argument("name", metavar="NAME", type=one_of("experiment", experiments), help="one of `list`")
        command.add_argument("--seeds", type=positive, default=5, help="run seeds 0 to SEEDS - 1 (default %(default)s)")
        command.add_argument("--quick", action="store_true", help="a small version that ends in a minute or so")
        command.add_argument("--dataset-root", type=folder, metavar="DIR", help="where data sets are")
        command.add_argument("--out", type=folder, default=Path("results"), metavar="DIR", help="default: results")
        if experiment is not None:
            experiment.add_arguments(command)
    reports.add_argument(
        "--readme", type=document, metavar="FILE", help="also put it between the experiment's markers in this file"
    )
    runs.add_argument("--workers", type=positive, metavar="N", help="processes; default one per CPU")
    return top


def read_options(experiment: Experiment, chosen: argparse.Namespace) -> Options:
    """The options of an experiment, each from the argument of its name."""
    return experiment.options_type(**{f.name: getattr(chosen, f.name) for f in fields(experiment.options_type)})


def folder_name(experiment: Experiment, options: Options) -> str:
    """The results folder. A quick run has its own, so that it never replaces what a full one has left."""
    parts = [experiment.name, experiment.variant(options), "quick" if options.quick else ""]
    return "-".join(part for part in parts if part)


def list_experiments(experiments: Mapping[str, Registered]) -> int:
    width = max(map(len, experiments))
    for name, entry in sorted(experiments.items()):
        print(f"{name:{width}}  {entry.summary}")
    return 0


def report(experiment: Experiment, store: Store, words: Sequence[str], readme: Path | None = None) -> int:
    """Write the report of the grid that ran last in the folder, also between the markers of a document."""
    results = load_results(store, f"{PROGRAM} {shlex.join(['run', *words[1:]])}")
    if results.missing:
        print(f"{results.missing} of {len(results.manifest['units'])} units are missing.", file=sys.stderr)
    markdown = write_report(experiment, results, store)
    if readme is not None:
        insert(readme, experiment.name, excerpt(markdown, results))
    print(markdown)
    print(f"\n{where(store)}")
    return 0


def without(words: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value.

    >>> without(["report", "cost", "--readme", "README.md", "--quick"], "--readme")
    ['report', 'cost', '--quick']
    """
    kept = [word for word in words if not word.startswith(f"{option}=")]
    if option in kept:
        start = kept.index(option)
        del kept[start : start + 2]
    return kept
