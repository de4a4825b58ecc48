"""``report.html``: Markdown with its figures as one page that needs neither network nor other files."""

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader
from markdown import Markdown
from markdown.extensions.toc import TocExtension, slugify

PAGE = Path(__file__).parent / "page"
IMAGE = re.compile(r'<p><img alt="([^"]*)" src="([^"]*)" /></p>')


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
