"""The commands ``diff``, ``publish`` and ``readme``, and ``report`` without a name."""

import argparse
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import document, folder
from benchmarks.harness.errors import UsageError
from benchmarks.harness.registered import Registered, load

Experiments = Mapping[str, Registered]


def add_commands(commands: Any) -> None:
    """Declare them; each sets `act`, which is called with the parsed arguments and the experiments."""
    compare = commands.add_parser("diff", help="what changed from one results folder to another", allow_abbrev=False)
    for name in ("a", "b"):
        compare.add_argument(name, metavar=name.upper(), type=Path, help="a results folder, or a published file")
    compare.add_argument("--metric", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page")
    compare.set_defaults(act=_diff)
    publish = commands.add_parser("publish", help="keep what the README's tables need of results", allow_abbrev=False)
    publish.add_argument("folder", metavar="FOLDER", type=folder, help="a results folder")
    publish.add_argument("--as", dest="published", metavar="NAME", help="default: the name of the folder")
    publish.add_argument("--figure", action="append", default=[], metavar="FILE", help="keep it too; repeatable")
    publish.set_defaults(act=_publish)
    readme = commands.add_parser("readme", help="fill the README's tables from published results", allow_abbrev=False)
    readme.add_argument("file", nargs="?", type=document, default=Path("README.md"), metavar="FILE")
    readme.add_argument("--check", action="store_true", help="change nothing; status 1 where it is not current")
    readme.set_defaults(act=_readme)


def report_all(out: Path, experiments: Experiments) -> int:
    """Each report below a folder again, and one page of all. Status 1 where one could not be written."""
    from benchmarks.harness.report import write_reports

    written, problems = write_reports(out, partial(load, experiments=experiments))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{len(written)} reports on one page: {out / 'report.html'}")
    return 1 if problems else 0


def _diff(chosen: argparse.Namespace, experiments: Experiments) -> int:
    from benchmarks.harness.difference import difference

    markdown = difference(chosen.a, chosen.b, chosen.metric)
    if chosen.html is not None:
        from benchmarks.harness.html import Part, page
        from benchmarks.harness.store import write_atomically

        write_atomically(chosen.html, page(Part(f"{chosen.a} and {chosen.b}", markdown, chosen.html.parent)))
    print(markdown)
    return 0


def _publish(chosen: argparse.Namespace, experiments: Experiments) -> int:
    from benchmarks.harness.published import FIGURES, FOLDER, publish, read_results
    from benchmarks.harness.readme import rendered

    name = chosen.published or chosen.folder.resolve().name
    absent = [figure for figure in chosen.figure if not (chosen.folder / figure).is_file()]
    if absent:
        known = ", ".join(sorted(path.name for path in chosen.folder.glob("*.png"))) or "none"
        raise UsageError(f"there is no figure {', '.join(absent)} in {chosen.folder}. Those that are there: {known}.")
    results = read_results(chosen.folder)
    path, dropped = publish(results, name, partial(rendered, load=partial(load, experiments=experiments)), FOLDER)
    print(f"{path}\ndropped: {dropped}")
    for figure in chosen.figure:
        kept = FIGURES / (figure if Path(figure).stem == name else f"{name}-{figure}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        print(shutil.copyfile(chosen.folder / figure, kept))
    print(f"Its markers: <!-- {name}:begin --> and <!-- {name}:end -->. To fill them: python -m benchmarks readme")
    return 0


def _readme(chosen: argparse.Namespace, experiments: Experiments) -> int:
    from benchmarks.harness.published import FOLDER
    from benchmarks.harness.readme import filled
    from benchmarks.harness.store import write_atomically

    text, changed = filled(chosen.file, partial(load, experiments=experiments), FOLDER)
    if chosen.check:
        for name in changed:
            print(f"{chosen.file}: '{name}' is not what its published results say.", file=sys.stderr)
        if changed:
            print(f"Bring it up to date: python -m benchmarks readme {chosen.file}", file=sys.stderr)
        return 1 if changed else 0
    if changed:
        write_atomically(chosen.file, text)
    print(f"{chosen.file}: {', '.join(changed) or 'nothing'} changed.")
    return 0
