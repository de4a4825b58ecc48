"""The README is short, and what READMEs link to is there; `test_snippets.py` runs their snippets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "avalanche_curv" / "README.md",
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]  # fmt: skip
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    assert [link for link in links if not leads_somewhere(link, document)] == []


def leads_somewhere(link: str, document: Path) -> bool:
    place, _, heading = link.partition("#")
    target = document.parent / place if place else document
    return target.exists() and (not heading or heading in anchors(target))


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_experiment_has_a_page() -> None:
    from benchmarks.registry import EXPERIMENTS

    pages = {path.parent.name for path in DOCUMENTS}
    folders = {entry.target.split(":")[0].split(".")[2] for entry in EXPERIMENTS.values()}
    assert folders - pages <= {"tune"}  # which only serves the others
