"""``report.md`` and ``report.html``: what the experiment says of its results, and where the numbers come from."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness.errors import UsageError
from benchmarks.harness.html import Part, page
from benchmarks.harness.manifest import PACKAGES
from benchmarks.harness.results import Results, load
from benchmarks.harness.store import Store, write_atomically

Report = Callable[[Results, Path], str]
SELECTED = 40  # so many runs TensorBoard selects when it opens


def write_report(report: Report, results: Results, store: Store) -> str:
    """Write what an experiment's `report` says of the results, as Markdown and as one page, and return it.

    It takes the place of the last one as a whole, so that a report which fails leaves that as it was.
    """
    with TemporaryDirectory(dir=store.root, prefix=".report-") as folder:
        new = Store(Path(folder))
        markdown = report(results, new.root).strip()
        notice = f"> {_incomplete(results)}\n\n" if results.missing else ""
        text = f"{notice}{markdown}\n\n{provenance(results)}\n"
        write_atomically(new.report, text)
        write_atomically(new.page, page(store.root.name, [Part(store.root.name, text, new.root)]))
        written = {file.name for file in new.root.iterdir()}
        for name in written:
            (new.root / name).replace(store.root / name)
    for figure in store.root.glob("*.png"):
        if figure.name not in written:
            figure.unlink()
    return markdown


def write_reports(out: Path, report: Callable[[str], Report]) -> tuple[list[Path], list[str]]:
    """Write each report below a folder again, by `report(experiment's name)`, and one page of all, ``report.html``.

    Returns the folders, and why others could not be reported on. Raises UsageError where there is none.
    """
    folders = sorted(path.parent for path in out.glob("*/manifest.json"))
    parts, problems = [], []
    for folder in folders:
        store = Store(folder)
        try:
            manifest = json.loads(store.manifest.read_text(encoding="utf-8"))
            write_report(report(manifest["experiment"]), load(store, manifest["command"]), store)
            parts.append(Part(folder.name, store.report.read_text(encoding="utf-8"), folder))
        except Exception as error:  # what is wrong with one folder must not cost the page of the others
            problems.append(f"{folder}: {error if isinstance(error, UsageError) else repr(error)}")
    if not parts:
        found = "; ".join(problems) or "there are no results in it."
        raise UsageError(f"nothing to report on in {out}: {found} Run something first: python -m benchmarks run NAME")
    write_atomically(out / "report.html", page(f"Results in {out.resolve().name}", parts))
    return [part.figures for part in parts], problems


def where(store: Store) -> str:
    """Where the report and its figures are, and how to open the curves."""
    lines = [f"Report: {store.report}", f"Page: {store.page}"]
    lines += [f"Figure: {path}" for path in sorted(store.root.glob("*.png"))]
    runs = sum(1 for _ in (store.root / "tensorboard").glob("*/*"))
    if runs:
        lines.append(f"Curves: tensorboard --logdir {store.root / 'tensorboard'}")
    if runs > SELECTED:
        lines.append(f"{runs} runs: TensorBoard shows none of more than {SELECTED} at first; tick those to compare.")
    return "\n".join(lines)


def provenance(results: Results) -> str:
    """A section that says how to get the same numbers again."""
    manifest = results.manifest
    commits = sorted({header["commit"] or "unknown" for header in results.headers})
    seeds = sorted({header["seed"] for header in results.headers})
    versions = ", ".join(f"{name} {manifest[name]}" for name in ("python", *PACKAGES))
    peak = max(header["peak_memory"] for header in results.headers) / 2**20
    device = ", ".join(name for name in manifest["device"].values() if name)
    lines = [
        "## Where these numbers come from",
        "",
        f"- Command: `{manifest['command']}`",
        f"- Commit: {', '.join(commits)}",
        f"- Grid: `{manifest['grid']}`, {len(results.headers)} of {len(manifest['units'])} units finished, "
        f"seeds {', '.join(map(str, seeds))}",
        f"- Versions: {versions}",
        f"- Machine: {device}; {manifest['cpus']} CPUs, one thread per worker",
        f"- Cost: {manifest['unit_seconds']:.0f} s of computation, at most {peak:.0f} MiB in one process",
    ]
    return "\n".join(lines)


def _incomplete(results: Results) -> str:
    return f"{results.missing} of {len(results.manifest['units'])} units are missing; n says how many entered a number."
