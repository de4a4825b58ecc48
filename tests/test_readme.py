"""The README's snippets run as they stand, it is short, and what READMEs link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "avalanche_curv" / "README.md",
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]  # fmt: skip
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a reader has at hand: a model, its optimizer, a benchmark, batches and a task loss."""
    from avalanche_curv import SineBoundary

    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs, targets = torch.randn(10, 2), torch.randint(2, (10,))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "benchmark": SineBoundary(2, examples=20, seed=0),
        "batches": [(inputs, targets)],
        "task_loss": nn.CrossEntropyLoss()(model(inputs), targets),
    }


def test_readme_is_short_and_has_a_snippet_for_each_use() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250
    assert len(SNIPPETS) == 6


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[-1][:40])
def test_snippet_runs(snippet: str, names: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = dict(names)
    exec(compile(snippet, str(README), "exec"), scope)
    if "strategy" in scope:
        scope["strategy"].train(scope["benchmark"].train_stream[0], eval_streams=[])
    for logger in getattr(scope.get("evaluator"), "loggers", ()):
        if hasattr(logger, "writer"):  # writes until it is closed, and the folder is left
            logger.writer.close()


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
