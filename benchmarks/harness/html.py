"""``report.html``: Markdown with its figures as one page that needs neither network nor other files."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element, SubElement

from jinja2 import Environment, FileSystemLoader, Template
from markdown import Markdown
from markdown.extensions.toc import TocExtension, slugify
from markdown.treeprocessors import Treeprocessor

PAGE = Path(__file__).parent / "page"
DEPTH = "1-3"  # of the headings in the table of contents


@dataclass(frozen=True)
class Part:
    """Markdown and the folder of its figures; `name` is its folded section on a page of several."""

    name: str
    markdown: str
    figures: Path


def page(part: Part) -> str:
    """One report as a page.

    Figures are inline as data URIs, raw HTML in the Markdown is shown as text, tables scroll within the page and sort
    by a click on a heading.
    """
    body, tokens = _rendered(part, prefix="")
    return _template().render(title=part.name, body=body, tokens=tokens)


def pages(title: str, parts: Sequence[Part]) -> str:
    """Several reports on one page, each a section that folds."""
    sections, tokens = [], []
    for number, part in enumerate(parts, start=1):
        place = f"part-{number}"
        body, inner = _rendered(part, prefix=f"{place}-")
        below = inner[0]["children"] if len(inner) == 1 else inner  # the section's name stands for a single title
        sections.append({"id": place, "name": part.name, "body": body})
        tokens.append({"id": place, "html": escape(part.name), "children": below})
    return _template().render(title=title, sections=sections, tokens=tokens)


def _template() -> Template:
    return Environment(loader=FileSystemLoader(PAGE), autoescape=True).get_template("page.html")


def _rendered(part: Part, prefix: str) -> tuple[str, list[dict[str, Any]]]:
    """The HTML of a part, and the tree of its headings, whose places begin with the prefix."""

    def place(text: str, separator: str) -> str:
        return prefix + slugify(text, separator, unicode=True)

    headings = TocExtension(toc_depth=DEPTH, slugify=place)
    converter = Markdown(extensions=["tables", "fenced_code", "sane_lists", headings])
    converter.treeprocessors.register(_Framed(converter, part.figures), "framed", 15)  # after inline patterns, at 20
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = converter.convert(part.markdown)
    return body, list(getattr(converter, "toc_tokens", []))


class _Framed(Treeprocessor):
    """Figures as data URIs, and tables in a frame that scrolls."""

    def __init__(self, md: Markdown, figures: Path) -> None:
        super().__init__(md)
        self.figures = figures

    def run(self, root: Element) -> None:
        for parent in list(root.iter()):
            for place, child in enumerate(list(parent)):
                if child.tag == "table":
                    parent[place] = _framed(child)
                elif child.tag == "p" and [inner.tag for inner in child] == ["img"] and not (child.text or "").strip():
                    parent[place] = _figure(child[0], self.figures)


def _framed(table: Element) -> Element:
    frame = Element("div", {"class": "table", "tabindex": "0"})
    frame.tail, table.tail = table.tail, None
    frame.append(table)
    return frame


def _figure(image: Element, folder: Path) -> Element:
    """A figure with its alternative text as the caption; the caption alone where the file is absent."""
    figure = Element("figure")
    path = folder / unquote(image.get("src", ""))
    caption = image.get("alt", "")
    if path.is_file() and path.resolve().is_relative_to(folder.resolve()):  # no file from elsewhere enters a page
        image.set("src", f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}")
        image.set("loading", "lazy")
        figure.append(image)
    else:
        caption = f"{caption} (the figure {path.name} is absent)"
    SubElement(figure, "figcaption").text = caption
    return figure
