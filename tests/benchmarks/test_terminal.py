"""What a terminal shows: a table that fits, lines that stay lines, and progress without noise."""

import io
import re

import pytest

from benchmarks.harness import Summary
from benchmarks.harness.progress import Progress
from benchmarks.harness.tables import Column, table
from benchmarks.harness.terminal import MOST, Glance, first_table, show
from benchmarks.strategies import MAIN, STRATEGIES

COLUMNS = [
    Column("strategy"), Column("accuracy", best=max), Column("when learned"), Column("less Naive"), Column("verdict"),
]  # fmt: skip
ROWS = [[name, Summary(0.5, 0.01, 5), Summary(0.25, 0.02, 5), 0.1, "within noise"] for name in STRATEGIES]
GLANCE = Glance(MAIN, {"accuracy": "over all experiences", "less ": "", "verdict": "of a t-test"})
PATH = "Report: /a/long/folder/" + "x" * 100
TEXT = f"# Title\n\nWords.\n\n{table(COLUMNS, ROWS, {'EWC': 'a note'})}\n\n![A figure](a.png)"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def lines(capsys, width):
    show(TEXT, GLANCE, [PATH], width)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_rows_that_matter_fit_the_width_and_paths_stay_whole(capsys, width):
    *shown, last = lines(capsys, width)
    assert last == PATH
    assert max(map(len, shown)) <= width
    assert shown[0] == "Title"
    labels = [line[: line.index(" 0.500")].strip() for line in shown if " 0.500 ± 0.010" in line]
    assert len(labels) == MOST
    for label, name in zip(labels, [name for name in STRATEGIES if name in MAIN]):
        words = label.split(" … ")
        assert label == name if len(words) == 1 else (name.startswith(words[0]) and name.endswith(words[1]))
    assert f"{len(STRATEGIES) - MOST} more rows are in the report." in shown
    assert not any(mark in line for line in shown for mark in ("|", "**", "![", "a note", "¹"))


def test_columns_that_matter_stay_where_labels_are_shortened(capsys):
    assert lines(capsys, 80)[2].split() == ["strategy", "accuracy", "less", "Naive", "verdict"]
    assert "when learned" in lines(capsys, 120)[2]


def test_a_meaning_is_given_of_the_columns_that_are_shown(capsys):
    assert "verdict: of a t-test" in lines(capsys, 80)
    assert "verdict: of a t-test" not in lines(capsys, 45)


def test_labels_that_would_be_equal_when_shortened_stay_whole_on_two_lines(capsys):
    names = ["CurvatureEWC batched emp. Fisher, merge", "CurvatureEWC empirical Fisher, merge"]
    rows = [[name, Summary(0.5, 0.01, 5)] for name in names]
    show(table([Column("strategy"), Column("accuracy")], rows), Glance(), [], 44)
    printed = capsys.readouterr().out
    assert " ".join(printed.replace("0.500 ± 0.010", "").split()).endswith(" ".join(names))


def test_foreign_text_is_shown_as_it_is(capsys):
    rows = [["[red]a|b[/red]", 0.5]]
    show(table([Column("row"), Column("x", best=max)], rows), Glance(), [])
    assert "[red]a|b[/red]  0.500" in capsys.readouterr().out


def test_a_report_without_a_table_is_its_title_and_its_paths(capsys):
    show("# Title\n\nNothing.", Glance(), [PATH])
    assert capsys.readouterr().out == f"Title\n\n{PATH}\n"
    assert first_table("") == ("", [])


def test_elsewhere_than_in_a_terminal_there_are_no_control_characters_and_nothing_is_cut(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(TEXT, GLANCE, [PATH])
    with Progress(2, 0, 2) as progress:
        progress.ended("CurvatureEWC Fisher, Kronecker, adaptive", 0, failed=False)
        progress.ended("Naive", 0, failed=True)
    printed = capsys.readouterr()
    assert not CONTROL.search(printed.out + printed.err)
    assert "CurvatureEWC Fisher, Kronecker, adaptive  0.500 ± 0.010" in printed.out
    start, end = printed.err.splitlines()
    assert start == "starting 2 workers for 2 units"
    assert end == "2 of 2 units: Naive seed 0 FAILED"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_when_there_is_something_to_count(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    import sys

    with Progress(5, 1, 2) as progress:
        begun = sys.stderr.getvalue()
        progress.ended("CurvatureEWC Fisher, Kronecker, adaptive", 0, failed=False)
    assert begun.strip() == "starting 2 workers for 4 units"
    last = sys.stderr.getvalue().rstrip().split("\r")[-1]
    assert last.startswith(" 40% |")
    assert "2/5 units" in last
    assert last.endswith("CurvatureEWC … adaptive seed 0")


def test_the_time_left_does_not_count_the_start_of_the_workers(capsys, monkeypatch):
    clock = iter([0.0, 60.0, 60.0, 60.0, 80.0, 80.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Progress(5, 0, 2) as progress:
        progress.ended("a", 0, failed=False)  # after a minute
        progress.ended("b", 0, failed=False)  # 20 seconds later
    assert capsys.readouterr().err.splitlines()[1:] == ["1 of 5 units: a seed 0", "2 of 5 units, 01:00 left: b seed 0"]


def test_a_run_of_nothing_shows_no_progress(capsys):
    with Progress(3, 3, 2):
        pass
    assert capsys.readouterr().err == ""
