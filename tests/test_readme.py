"""The README's snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a reader has at hand: a model, its optimizer, a benchmark, batches and a task loss."""
    from avalanche.training import Naive

    from avalanche_curv import SineBoundary

    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs, targets = torch.randn(10, 2), torch.randint(2, (10,))
    return {
        "torch": torch,
        "Naive": Naive,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "benchmark": SineBoundary(2, examples=20, seed=0),
        "batches": [(inputs, targets)],
        "task_loss": nn.CrossEntropyLoss()(model(inputs), targets),
    }


def test_readme_shows_the_twelve_ways_to_use_the_package() -> None:
    assert len(SNIPPETS) == 12


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.strip().splitlines()[-1][:40])
def test_snippet_runs(snippet: str, names: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = dict(names)
    exec(compile(snippet, str(README), "exec"), scope)
    if "strategy" in scope:
        scope["strategy"].train(scope["benchmark"].train_stream[0], eval_streams=[])
    for name in ("tensorboard", "evaluator"):  # writes until it is closed, and the folder is left
        for logger in getattr(scope.get(name), "loggers", [scope.get(name)]):
            if hasattr(logger, "writer"):
                logger.writer.close()
