"""The tables of prices."""

from benchmarks.experiments.cost.report import report
from benchmarks.harness.results import Results

LABEL = "MLP 784-400-400-10"
OURS, PEER = "empirical Fisher, diagonal", "nngeometry, Fisher, diagonal"
TOOL = {"title": PEER, "package": "nngeometry", "version": "0.4"}


def results(*records):
    """Results of one model with one row of ours, and peers."""
    rows = tuple({"label": LABEL, "seed": 0, "step": None, "value": 1.0, **record} for record in records)
    works = [{"name": OURS, "examples": None}]
    config = {"works": works, "peers": [TOOL], "examples": 10, "peer_examples": 10, "batch": 5, "rounds": 3}
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
