"""The tables of prices."""

from benchmarks.experiments.cost.report import report
from benchmarks.harness import Results

LABEL = "MLP 784-400-400-10"
OURS, PEER = "empirical Fisher, diagonal", "nngeometry, Fisher, diagonal"
TOOL = {"title": PEER, "package": "nngeometry", "version": "0.4"}


def written_of(*records):
    """The report of one model with one row of ours, and peers."""
    rows = tuple({"label": LABEL, "seed": 0, "step": None, "value": 1.0, **record} for record in records)
    works = [{"name": OURS, "examples": None}]
    config = {"works": works, "peers": [TOOL], "examples": 10, "peer_examples": 10, "batch": 5, "rounds": 3}
    header = {"label": LABEL, "seed": 0, "config": config}
    return report(Results((LABEL, "conv net"), rows, (header,)), None)


def cells(markdown, name):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_shows_its_price_beside_its_goal_and_bytes_in_mebibytes():
    values = {
        "build/ratio": 1.04, "step1/ratio": 1.2, "bytes/held": 3 * 2**20, "bytes/foreseen": 2**20, "error": 0.9,
        "trace": 1.0,
    }  # fmt: skip
    written = written_of(*({"metric": metric, "row": OURS, "value": value} for metric, value in values.items()))
    assert cells(written, OURS) == [OURS, "1.04", "≤ 1.1", "1.20", "", "–", "3.00", "1.00", "0.900", "1.00"]
    assert "## conv net" not in written  # no unit of it has finished


def test_a_peer_that_fails_has_a_dash_and_its_reason_below():
    written = written_of({"metric": "failed", "row": PEER, "reason": "TypeError: no\n such layer."})
    assert cells(written, "nngeometry")[:2] == ["nngeometry, Fisher, diagonal¹", "–"]
    assert "\n¹ TypeError: no such layer.\n" in written


def test_versions_of_peers_are_told_and_absent_ones_with_the_way_to_them():
    written = written_of({"metric": "absent", "row": "laplace-torch", "package": "laplace-torch"})
    assert "Peers: nngeometry 0.4." in written
    assert "Not installed, and so not in the tables: laplace-torch." in written
    assert 'python -m pip install -e ".[peers]"' in written
    assert "Not installed" not in written_of()
