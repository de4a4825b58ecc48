"""``report.md`` and ``report.html``: the report of an experiment, and the origin of its numbers."""

import re
import traceback
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import unescape
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote
from xml.etree.ElementTree import Element, SubElement

from jinja2 import Environment, FileSystemLoader
from markdown import Markdown
from markdown.extensions.toc import TocExtension, slugify
from markdown.treeprocessors import Treeprocessor

from benchmarks.harness.errors import UsageError
from benchmarks.harness.manifest import PACKAGES
from benchmarks.harness.reading import code
from benchmarks.harness.results import Results, load, read_manifest
from benchmarks.harness.store import Store, write_atomically

Report = Callable[[Results, Path], str]
PAGE = Path(__file__).parent / "page"
AGAIN = "python -m benchmarks run NAME"
TITLE = re.compile(r"^# (.+?)\s*$", re.MULTILINE)
SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
DIGITS = str.maketrans(SUPERSCRIPTS, "0123456789")
MARK = re.compile(rf"[{SUPERSCRIPTS}]+")
PNG = b"\x89PNG\r\n\x1a\n"
ADDRESS = re.compile(r"https?://|#")
IMAGE = re.compile(r'<p><img alt="([^"]*)" src="([^"]*)" /></p>')


def write_report(report: Report, results: Results, store: Store) -> str:
    """Write an experiment's `report` on the results, as Markdown and as one page, and return its Markdown.

    It replaces the last one as a whole: where it fails, that stays as it was.
    """
    shown = results.in_plain_text()
    with TemporaryDirectory(dir=store.root, prefix=".report-") as folder:
        new = Store(Path(folder))
        markdown = _reported(report, shown, new.root, store).strip()
        missing = f"{results.missing} of {len(results.manifest['units'])} units are missing; n says how many entered"
        notice = f"> {missing} a number.\n\n" if results.missing else ""
        text = f"{notice}{markdown}\n\n{provenance(shown)}\n"
        write_atomically(new.report, text)
        write_atomically(new.page, page(_title(text, store.root.name), [Part(store.root.name, text, new.root)]))
        written = {file.name for file in new.root.iterdir()}
        for name in written:
            (new.root / name).replace(store.root / name)
    for figure in store.root.glob("*.png"):
        if figure.name not in written:
            figure.unlink()
    return markdown


def _title(markdown: str, name: str) -> str:
    """The first heading, and the name of the results where it does not say that."""
    heading = TITLE.search(markdown)
    return f"{heading[1]} ({name})" if heading else name


def _reported(report: Report, results: Results, folder: Path, store: Store) -> str:
    """The Markdown of a report. Raises UsageError where it fails, such as on results of another version of its
    experiment, and leaves the traceback in ``report.error.txt``."""
    try:
        markdown = report(results, folder)
    except (UsageError, OSError):
        raise
    except Exception as error:
        write_atomically(store.report_error, traceback.format_exc())
        said = traceback.format_exception_only(error)[-1].strip()
        raise UsageError(
            f"the report on {store.root} failed ({said}): {store.report_error} has the traceback. Are the results of "
            "another version of the experiment, or not all there? A run leaves those that its report fits."
        ) from error
    store.report_error.unlink(missing_ok=True)
    return markdown


def write_reports(out: Path, report: Callable[[str], Report]) -> tuple[list[Path], list[str]]:
    """Write each report below a folder again, by `report(experiment's name)`, and one page of all, ``report.html``.

    Returns the folders, and what could not be reported on: folders, and files that are left out of the reports. Raises
    UsageError where there is no report.
    """
    folders = sorted(path.parent for path in out.glob("*/manifest.json"))
    parts, problems = [], []
    for folder in folders:
        store = Store(folder)
        try:
            manifest = read_manifest(store, AGAIN)
            results = load(store, manifest["command"])
            write_report(report(manifest["experiment"]), results, store)
            problems += [f"left out: {line}" for line in results.left_out]
            parts.append(Part(folder.name, store.report.read_text(encoding="utf-8"), folder))
        except Exception as error:  # what is wrong with one folder must not cost the page of the others
            problems.append(f"{folder}: {error if isinstance(error, UsageError) else repr(error)}")
    if not parts:
        found = "; ".join(problems) or "there are no results in it."
        raise UsageError(f"nothing to report on in {out}: {found} Run something first: python -m benchmarks run NAME")
    write_atomically(out / "report.html", page(f"Results in {out.resolve().name}", parts))
    return [folder for folder in folders if folder in {part.figures for part in parts}], problems


def where(store: Store) -> str:
    """Lines with the paths of the report and its page, and the commands that open the curves."""
    lines = [f"Report: {store.report}", f"Page: {store.page}"]
    selected, runs = (sum(1 for _ in at) for at in (store.selected_runs.glob("*"), store.all_runs.glob("*/*")))
    if selected:
        lines.append(f"Curves: tensorboard --logdir {store.selected_runs}")
    if runs > selected:
        lines.append(f"Curves of all {runs} runs: tensorboard --logdir {store.all_runs}")
    return "\n".join(lines)


def provenance(results: Results) -> str:
    """A section with the command, versions and machine behind the numbers."""
    manifest = results.manifest
    commits = sorted({str(header.get("commit") or "unknown") for header in results.headers})
    seeds = sorted({header["seed"] for header in results.headers})
    versions = ", ".join(f"{name} {manifest.get(name, 'unknown')}" for name in ("python", *PACKAGES))
    seconds = sum(header.get("seconds") or 0.0 for header in results.headers)
    peak = max(header.get("peak_memory") or 0 for header in results.headers) / 2**20
    device = ", ".join(str(name) for name in manifest.get("device", {}).values() if name) or "unknown"
    lines = [
        "## Where these numbers come from",
        "",
        f"- Command: {code(manifest['command'])}",
        f"- Commit: {', '.join(commits)}",
        f"- Grid: {code(str(manifest.get('grid')))}, {len(results.headers)} of {len(manifest['units'])} units "
        f"finished, seeds {', '.join(map(str, seeds))}",
        f"- Versions: {versions}",
        f"- Machine: {device}; {manifest.get('cpus', 'unknown')} CPUs, one thread per worker",
        f"- Cost: {seconds:.0f} s of computation, at most {peak:.0f} MiB in one process",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """Markdown and the folder of its figures, None where it has none; `name` is its title, and its folded section on a
    page of several."""

    name: str
    markdown: str
    figures: Path | None


def page(title: str, parts: Sequence[Part]) -> str:
    """One report, or several reports each in a section that folds, as a page.

    Figures are inline as data URIs: PNG files of the part's folder, each named in a line of its own. Other images, raw
    HTML, and links that do not lead into the web or the page are shown as text. Tables scroll within the page and sort
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
    converter.treeprocessors.register(_Harmless(converter), "harmless", 15)  # after those that make the elements
    converter.treeprocessors.register(_Footnotes(converter, prefix), "footnotes", 10)
    body = converter.convert(part.markdown)
    body = body.replace("<table>", '<div class="table" tabindex="0">\n<table>').replace("</table>", "</table>\n</div>")
    return IMAGE.sub(lambda image: _figure(image[1], image[2], part.figures), body), getattr(converter, "toc", "")


class _Harmless(Treeprocessor):
    """Turns into text each link that does not lead into the web or the page, and each image in the middle of text."""

    def run(self, root: Element) -> None:
        for parent in root.iter():
            alone = parent.tag == "p" and len(parent) == 1 and not (parent.text or "").strip()
            for child in parent:
                if child.tag == "a" and not ADDRESS.match(child.get("href", "")):
                    child.tag, child.attrib = "span", {}
                elif child.tag == "img" and not (alone and not (child.tail or "").strip()):
                    child.text = child.get("alt", "")
                    child.tag, child.attrib = "span", {}


class _Footnotes(Treeprocessor):
    """Links the marks in the first column of a table with the notes below it, both ways."""

    def __init__(self, converter: Markdown, prefix: str) -> None:
        super().__init__(converter)
        self._prefix = prefix

    def run(self, root: Element) -> None:
        tables = [place for place, child in enumerate(root) if child.tag == "table"]
        for number, place in enumerate(tables, start=1):
            for note in takewhile(_leading, root[place + 1 :]):
                mark = _leading(note)
                name = f"{self._prefix}table-{number}-note-{mark.translate(DIGITS)}"
                cells = [row[0] for row in root[place].iterfind("tbody/tr") if len(row) and _marked(row[0]) == mark]
                for cell in cells:
                    _cut(cell, len(mark))
                    link = SubElement(cell, "a", {"href": f"#{name}", "class": "mark"})
                    link.text = mark
                if cells:
                    cells[0][-1].set("id", f"{name}-from")
                    note.set("id", name)
                    note.set("class", "note")
                    back = Element("a", {"href": f"#{name}-from", "class": "mark"})
                    back.text, back.tail, note.text = mark, (note.text or "")[len(mark) :], None
                    note.insert(0, back)


def _leading(note: Element) -> str:
    """The mark at the start of a paragraph, or nothing."""
    found = MARK.match(note.text or "") if note.tag == "p" else None
    return found[0] if found else ""


def _marked(cell: Element) -> str:
    """The mark at the end of a cell, or nothing."""
    text = (cell[-1].tail if len(cell) else cell.text) or ""
    return text[len(text.rstrip(SUPERSCRIPTS)) :]


def _cut(cell: Element, count: int) -> None:
    """Remove so many characters from the end of a cell's text."""
    if len(cell):
        cell[-1].tail = (cell[-1].tail or "")[:-count]
    else:
        cell.text = (cell.text or "")[:-count]


def _figure(caption: str, source: str, folder: Path | None) -> str:
    """A figure with its alternative text as the caption; the caption alone where the folder has no such file."""
    data = None if folder is None else _picture(folder, unquote(unescape(source)))
    if data is None:
        caption += f" (the figure {source.rpartition('/')[2]} is absent)"
        return f"<figure><figcaption>{caption}</figcaption></figure>"
    image = f'<img alt="{caption}" src="data:image/png;base64,{b64encode(data).decode()}" loading="lazy">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _picture(folder: Path, name: str) -> bytes | None:
    """The PNG file of that name in the folder, None where there is none: no other file enters a page."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            return None
        data = path.read_bytes()
    except (OSError, ValueError):  # ValueError: a null byte
        return None
    return data if data.startswith(PNG) else None
