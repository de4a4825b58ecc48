"""Each recipe of the package's README adds one thing in a single file, and uses it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "avalanche_curv" / "README.md"
RECIPES = dict(
    re.findall(r"^### (An? [\w ]+)\n.*?^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)
)


def test_there_is_a_recipe_for_everything_that_one_may_add() -> None:
    subjects = "kind of curvature", "structure", "policy", "metric", "mitigator", "protection", "experiment"
    assert [title.partition(" ")[2] for title in RECIPES] == list(subjects)


def test_a_strategy_begins_from_a_pretrained_past(tmp_path: Path) -> None:
    section = README.read_text(encoding="utf-8").partition("## Which parameters, and a past to begin with\n")[2]
    file = tmp_path / "pretrained.py"
    file.write_text(section.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_adds_one_thing_in_a_file_of_its_own(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the experiment is imported by the name of its file
    file = tmp_path / ("powers.py" if title == "An experiment" else "recipe.py")
    file.write_text(RECIPES[title], encoding="utf-8")
    runpy.run_path(str(file), run_name="__main__")
    if title == "An experiment":
        (report,) = (tmp_path / "results").rglob("report.md")
        assert re.search(r"second moment +\| 0\.33", report.read_text(encoding="utf-8"))
