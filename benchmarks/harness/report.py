"""``report.md`` and ``report.html``: the report of an experiment, and the origin of its numbers."""

import json
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader
from markdown import Markdown
from markdown.extensions.toc import TocExtension, slugify

from benchmarks.harness.errors import UsageError
from benchmarks.harness.manifest import PACKAGES
from benchmarks.harness.results import Results, load
from benchmarks.harness.store import Store, write_atomically

Report = Callable[[Results, Path], str]
SELECTED = 40  # so many runs TensorBoard selects when it opens
PAGE = Path(__file__).parent / "page"
IMAGE = re.compile(r'<p><img alt="([^"]*)" src="([^"]*)" /></p>')


def write_report(report: Report, results: Results, store: Store) -> str:
    """Write an experiment's `report` on the results, as Markdown and as one page, and return its Markdown.

    It replaces the last one as a whole: where it fails, that stays as it was.
    """
    with TemporaryDirectory(dir=store.root, prefix=".report-") as folder:
        new = Store(Path(folder))
        markdown = report(results, new.root).strip()
        missing = f"{results.missing} of {len(results.manifest['units'])} units are missing; n says how many entered"
        notice = f"> {missing} a number.\n\n" if results.missing else ""
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
    """Lines with the paths of the report and its figures, and the command that opens the curves."""
    lines = [f"Report: {store.report}", f"Page: {store.page}"]
    lines += [f"Figure: {path}" for path in sorted(store.root.glob("*.png"))]
    runs = sum(1 for _ in (store.root / "tensorboard").glob("*/*"))
    if runs:
        lines.append(f"Curves: tensorboard --logdir {store.root / 'tensorboard'}")
    if runs > SELECTED:
        lines.append(f"{runs} runs: TensorBoard shows none of more than {SELECTED} at first; tick those to compare.")
    return "\n".join(lines)


def provenance(results: Results) -> str:
    """A section with the command, versions and machine behind the numbers."""
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


@dataclass(frozen=True)
class Part:
    """Markdown and the folder of its figures; `name` is its title, and its folded section on a page of several."""

    name: str
    markdown: str
    figures: Path


def page(title: str, parts: Sequence[Part]) -> str:
    """One report, or several reports each in a section that folds, as a page.

    Figures are inline as data URIs, raw HTML in the Markdown is shown as text, tables scroll within the page and sort
    by a click on a heading.
    """
    template = Environment(loader=FileSystemLoader(PAGE), autoescape=True).get_template("page.html")
    sections = []
    for number, part in enumerate(parts, start=1):
        place = f"part-{number}"
        body, contents = _rendered(part, f"{place}-" if len(parts) > 1 else "")
        sections.append({"id": place, "name": part.name, "body": body, "contents": contents})
    return template.render(title=title, sections=sections)


def _rendered(part: Part, prefix: str) -> tuple[str, str]:
    """The HTML of a part and of its table of contents; the anchors of its headings begin with the prefix."""
    headings = TocExtension(toc_depth="1-3", slugify=lambda text, separator: prefix + slugify(text, separator, True))
    converter = Markdown(extensions=["tables", "fenced_code", "sane_lists", headings])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = converter.convert(part.markdown)
    body = body.replace("<table>", '<div class="table" tabindex="0">\n<table>').replace("</table>", "</table>\n</div>")
    return IMAGE.sub(lambda image: _figure(image[1], image[2], part.figures), body), getattr(converter, "toc", "")


def _figure(caption: str, source: str, folder: Path) -> str:
    """A figure with its alternative text as the caption; the caption alone where the folder has no such file."""
    path, image = folder / unquote(unescape(source)), ""
    if path.is_file() and path.resolve().is_relative_to(folder.resolve()):  # no file from elsewhere enters a page
        data = b64encode(path.read_bytes()).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}" loading="lazy">'
    else:
        caption += f" (the figure {source.rpartition('/')[2]} is absent)"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
