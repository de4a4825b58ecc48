"""``report.html``: Markdown with its figures as one page that needs neither network nor other files."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element, SubElement

from markdown import Markdown
from markdown.extensions import Extension
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
    body, contents = _rendered(part, prefix="")
    return _document(part.name, contents, body)


def pages(title: str, parts: Sequence[Part]) -> str:
    """Several reports on one page, each a section that folds."""
    bodies, contents = [f"<h1>{escape(title)}</h1>"], []
    for number, part in enumerate(parts, start=1):
        body, inner = _rendered(part, prefix=f"part-{number}-")
        place = f"part-{number}"
        folded = f"<summary>{escape(part.name)}</summary>\n{body}\n"
        bodies.append(f'<details id="{place}"{" open" if len(parts) == 1 else ""}>{folded}</details>')
        contents.append({"id": place, "html": escape(part.name), "children": _below_title(inner)})
    return _document(title, contents, "\n".join(bodies))


def _rendered(part: Part, prefix: str) -> tuple[str, list[dict[str, Any]]]:
    """The HTML of a part, and the tree of its headings, whose places begin with the prefix."""

    def place(text: str, separator: str) -> str:
        return prefix + slugify(text, separator, unicode=True)

    contents = TocExtension(toc_depth=DEPTH, slugify=place)
    converter = Markdown(extensions=["tables", "fenced_code", "sane_lists", contents, _Inline(part.figures)])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = converter.convert(part.markdown)
    return body, list(getattr(converter, "toc_tokens", []))


class _Inline(Extension):
    """Figures as data URIs, and tables in a frame that scrolls."""

    def __init__(self, figures: Path) -> None:
        super().__init__()
        self.figures = figures

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Framed(md, self.figures), "framed", 15)  # after the inline patterns, at 20


class _Framed(Treeprocessor):
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
    if path.is_file():
        image.set("src", f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}")
        image.set("loading", "lazy")
        figure.append(image)
    else:
        caption = f"{caption} (the figure {path.name} is absent)"
    SubElement(figure, "figcaption").text = caption
    return figure


def _below_title(tokens: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The headings below a single title, which the name of the section stands for."""
    return list(tokens[0]["children"]) if len(tokens) == 1 else list(tokens)


def _contents(tokens: Sequence[dict[str, Any]]) -> str:
    if not tokens:
        return ""
    items = [f'<li><a href="#{token["id"]}">{token["html"]}</a>{_contents(token["children"])}</li>' for token in tokens]
    return f"<ul>{''.join(items)}</ul>"


def _document(title: str, contents: Sequence[dict[str, Any]], body: str) -> str:
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<div class="layout">
<nav aria-label="Contents">{_contents(contents)}</nav>
<main>
{body}
</main>
</div>
<script>
{script}</script>
</body>
</html>
"""
