"""Every snippet of every README, pasted into a fresh file: it runs, prints what stands below it, and has its effect."""

from __future__ import annotations

import gc
import re
import runpy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RAW = DATA / "MNIST" / "raw"
TITLES_AND_SNIPPETS = re.compile(
    r"^#+ (?P<heading>.+?)$|^\*\*(?P<bold>.+?)\*\*|"
    r"^```python\n(?P<code>.*?)^```$(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = r"\d+(?:\.\d+)?"


class Snippet(NamedTuple):
    """A script, and the output that the document shows below it."""

    code: str
    output: str | None


def snippets(document: Path) -> dict[str, Snippet]:
    """Those of a document, by the heading or the bold words before them."""
    found: dict[str, Snippet] = {}
    title = ""
    for match in TITLES_AND_SNIPPETS.finditer(document.read_text(encoding="utf-8")):
        title = (match["heading"] or match["bold"] or title).strip(".,:")
        if match["code"]:
            assert title not in found, f"{document}: the second snippet below {title!r} needs a title of its own"
            found[title] = Snippet(match["code"], match["output"])
    return found


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "avalanche_curv" / "README.md",
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]
SNIPPETS = {
    f"{document.parent.relative_to(ROOT)}: {title}": snippet
    for document in DOCUMENTS
    for title, snippet in snippets(document).items()
}

Effect = Callable[..., bool]
EFFECTS: dict[str, Effect] = {  # of the last number of each line that is printed
    ".: The strategy": lambda without, with_penalty: with_penalty > without + 0.02,
    ".: The plugin": lambda without, with_refresh, count: without < 0.21 and with_refresh > 0.6 and count > 2,
    ".: The metrics": lambda without, with_penalty: with_penalty < without / 4,
    "avalanche_curv: Any training loop": lambda without, with_penalty: with_penalty > without + 0.02,
    "avalanche_curv: Projection": lambda without, with_projection: with_projection > without + 0.02,
    "avalanche_curv: Plasticity": lambda without, with_penalty: with_penalty > without + 0.1,
    "avalanche_curv: In a loop of your own": lambda without, with_projection: with_projection < without / 4,
    "avalanche_curv: Online streams": lambda told, hidden: 0.5 < hidden / told < 2,
    "avalanche_curv: Saving": lambda apart: apart == 0,
}
ON_ALL = {".: The strategy", "avalanche_curv: Projection"}  # images of MNIST; a quarter lets one forget too little
RECIPES = "kind of curvature", "structure", "policy", "metric", "mitigator", "protection", "experiment"


def test_there_is_a_recipe_for_everything_that_one_may_add() -> None:
    recipes = [title for title in SNIPPETS if re.match(r"avalanche_curv: An? ", title)]
    assert [title.split(maxsplit=2)[2] for title in recipes] == list(RECIPES)


def test_every_effect_belongs_to_a_snippet_with_its_output() -> None:
    assert EFFECTS.keys() == {title for title, snippet in SNIPPETS.items() if "print(" in snippet.code}
    assert [title for title in EFFECTS if SNIPPETS[title].output is None] == []


def test_the_first_snippet_has_fifteen_lines() -> None:
    assert len(next(iter(SNIPPETS.values())).code.replace("# or:", "").splitlines()) <= 16  # with its alternative


@pytest.mark.parametrize("title", SNIPPETS)
def test_snippet_runs_and_has_its_effect(title: str, paste: Callable[..., str]) -> None:
    check_effect(title, paste(SNIPPETS[title].code))


@pytest.mark.slow
@pytest.mark.skipif(not RAW.is_dir(), reason="needs MNIST in ../shared/data")
@pytest.mark.parametrize("title", [title for title, snippet in SNIPPETS.items() if "# or:" in snippet.code])
def test_snippet_has_its_effect_on_split_mnist(
    title: str, paste: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from avalanche import benchmarks as theirs

    monkeypatch.setattr(theirs, "SplitMNIST", partial(part_of, theirs.SplitMNIST, 1 if title in ON_ALL else 4))
    check_effect(title, paste(on_mnist(SNIPPETS[title].code)))


def part_of(make: Callable[..., Any], every: int, experiences: int, **options: Any) -> Any:
    """Some images of Avalanche's split, as its transforms give them (`test_streams`), in memory."""
    from avalanche.benchmarks.datasets.external_datasets.mnist import get_mnist_dataset

    from benchmarks.data import DEVIATION, MEAN
    from benchmarks.streams import CLASS, TASK
    from benchmarks.streams.makers import _held

    whole = make(experiences, **options)
    for part in (whole.train_exps_patterns_assignment, whole.test_exps_patterns_assignment):
        part[:] = [places[::every] for places in part]
    scenario = TASK if options.get("return_task_id") else CLASS
    return _held(whole, get_mnist_dataset(DATA), (MEAN, DEVIATION), scenario, experiences)


def test_what_is_printed_for_mnist_differs_in_the_marked_lines_alone() -> None:
    code = "a = digits\n# or: a = mnist\nfor b in a:\n    c = 1\n    # or: c = 2\n    print(c)\n"
    assert on_mnist(code).endswith("a = mnist\nfor b in a:\n    c = 2\n    print(c)\n")


def on_mnist(code: str) -> str:
    """The snippet with what stands behind `# or:` in place of the line above, on images in DATA; of the first 12,000
    it takes a quarter."""
    imports = (
        "from avalanche.benchmarks import SplitMNIST\nfrom avalanche.models import SimpleMLP\n"
        "from torchvision.datasets import MNIST\n"
    )
    code = re.sub(r"^.*\n( *)# or: ", r"\1", code, flags=re.MULTILINE)
    code = re.sub(r"(SplitMNIST\([^)]*)\)", rf"\1, dataset_root={str(DATA)!r})", code)
    code = code.replace("[:12000]", "[:3000]")
    return imports + re.sub(r'MNIST\("data"(?:, download=True)?\)', f"MNIST({str(DATA)!r})", code)


@pytest.fixture
def paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """paste(code) -> what it prints as a file of its own, without a warning to the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the experiment is imported by the name of its file

    def printed(code: str) -> str:
        file = tmp_path / ("powers.py" if "powers:experiment" in code else "snippet.py")
        file.write_text(code, encoding="utf-8")
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "No loggers specified")
            runpy.run_path(str(file), run_name="__main__")
        gc.collect()  # loggers write until they are collected, and the folder is left
        return capsys.readouterr().out

    return printed


def check_effect(title: str, printed: str) -> None:
    if title in EFFECTS:
        shown = SNIPPETS[title].output
        assert re.sub(NUMBER, "1", printed) == re.sub(NUMBER, "1", shown or ""), "other words than below the snippet"
        for text in (shown or "", printed):
            numbers = [float(re.findall(NUMBER, line)[-1]) for line in text.splitlines()]
            assert EFFECTS[title](*numbers), text
    if title == "avalanche_curv: An experiment":
        (report,) = Path("results").rglob("report.md")
        assert re.search(r"second moment +\| 0\.33", report.read_text(encoding="utf-8"))
