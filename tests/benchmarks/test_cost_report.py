"""The tables of prices, and a report between the markers of a document."""

from pathlib import Path

import pytest

from benchmarks.cost.report import report
from benchmarks.harness import UsageError
from benchmarks.harness.command import main, without
from benchmarks.harness.markers import excerpt, insert, replaced
from benchmarks.harness.registered import Registered
from benchmarks.harness.results import Results

HERE = Path(__file__).parent
LABEL = "MLP 784-400-400-10"
OURS, PEER = "empirical Fisher, diagonal", "nngeometry, Fisher, diagonal (nngeometry 0.4)"
DOCUMENT = "# Title\n\n<!-- tiny:begin -->\nold\n<!-- tiny:end -->\n\nAfter.\n"


def results(*records, peers=(PEER,)):
    """Results of one model with one row of ours, and peers."""
    rows = tuple({"label": LABEL, "seed": 0, "step": None, "value": 1.0, **record} for record in records)
    works = [{"name": OURS, "examples": None}]
    config = {"works": works, "peers": list(peers), "examples": 10, "peer_examples": 10, "batch": 5, "rounds": 3}
    header = {"label": LABEL, "seed": 0, "config": config, "commit": "0123456789abcdef"}
    return Results((LABEL, "conv net"), rows, (header,), {"command": "python -m benchmarks run cost", "units": [1]})


def cells(markdown, name):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_shows_its_price_beside_its_goal_and_bytes_in_mebibytes():
    written = report(
        results(
            {"metric": "build/ratio", "row": OURS, "value": 1.04},
            {"metric": "step1/ratio", "row": OURS, "value": 1.2},
            {"metric": "bytes/held", "row": OURS, "value": 3 * 2**20},
            {"metric": "bytes/foreseen", "row": OURS, "value": 2**20},
            {"metric": "error", "row": OURS, "value": 0.9},
            {"metric": "trace", "row": OURS, "value": 1.0},
        )
    )
    assert cells(written, OURS) == [OURS, "1.04", "≤ 1.1", "1.20", "", "–", "3.00", "1.00", "0.900", "1.00"]
    assert "## conv net" not in written  # no unit of it has finished


def test_a_peer_that_fails_has_a_dash_and_its_reason_below():
    written = report(results({"metric": "failed", "row": PEER, "reason": "TypeError: no\n such layer."}))
    assert cells(written, "nngeometry")[:2] == ["nngeometry, Fisher, diagonal¹", "–"]
    assert "\n¹ TypeError: no such layer.\n" in written


def test_versions_of_peers_are_told_and_absent_ones_with_the_way_to_them():
    written = report(results({"metric": "absent", "row": "laplace-torch", "package": "laplace-torch"}))
    assert "Peers: nngeometry 0.4." in written
    assert "Not installed, and so not in the tables: laplace-torch." in written
    assert 'python -m pip install -e ".[peers]"' in written
    assert "Not installed" not in report(results())


def test_an_excerpt_names_its_source_and_fits_into_a_document():
    text = excerpt("# Title\n\n## Part\n\n![a figure](a.png)\n\n| a |", results())
    assert text == "`python -m benchmarks run cost` at commit 0123456.\n\n#### Part\n\n| a |"


def test_an_excerpt_of_an_incomplete_run_says_so():
    some = results()
    some.manifest["units"] = [1, 2, 3]
    assert "2 of 3 units are missing." in excerpt("# Title", some).splitlines()[0]


def test_text_between_markers_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    insert(path, "tiny", "new")
    once = path.read_text()
    assert once == "# Title\n\n<!-- tiny:begin -->\n\nnew\n\n<!-- tiny:end -->\n\nAfter.\n"
    insert(path, "tiny", "new")
    assert path.read_text() == once


@pytest.mark.parametrize(
    "document",
    [
        "",
        "<!-- tiny:begin -->\n",
        "<!-- tiny:end -->\n<!-- tiny:begin -->\n",
        DOCUMENT + DOCUMENT,
        "`<!-- tiny:begin -->` and `<!-- tiny:end -->`\n",
    ],
    ids=["none", "no end", "wrong order", "twice", "mentioned in a line"],
)
def test_missing_or_doubled_markers_are_an_error_that_names_them(document):
    with pytest.raises(UsageError, match=r"README.md needs the line '<!-- tiny:begin -->' once and, below it"):
        replaced(document, "tiny", "new", Path("README.md"))


def test_the_report_command_writes_into_a_document(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("TINY_LOG", str(tmp_path / "log"))
    experiments = {"tiny": Registered("tiny_experiment:experiment", "a tiny experiment")}
    readme, out = tmp_path / "README.md", ["--out", str(tmp_path / "out")]
    assert main(["run", "tiny", "--seeds", "1", "--workers", "1", *out], experiments) == 0

    readme.write_text("no markers")
    assert main(["report", "tiny", "--readme", str(readme), *out], experiments) == 2
    assert "<!-- tiny:begin -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers"

    readme.write_text(DOCUMENT)
    assert main(["report", "tiny", f"--readme={readme}", *out], experiments) == 0
    written = readme.read_text()
    assert "`python -m benchmarks run tiny --seeds 1" in written
    assert "| config" in written
    assert "old" not in written


def test_the_way_to_missing_results_leaves_the_document_out():
    words = ["report", "tiny", "--readme", "README.md", "--seeds", "2"]
    assert without(words, "--readme") == ["report", "tiny", "--seeds", "2"]
    assert without(["report", "tiny", "--readme=README.md"], "--readme") == ["report", "tiny"]
