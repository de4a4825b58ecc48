"""What is published of results, and the places of the README that it fills."""

import json
from pathlib import Path

import pytest

from benchmarks.harness import Results, UsageError
from benchmarks.harness.command import main
from benchmarks.harness.markers import replaced
from benchmarks.harness.published import FOLDER, LARGEST, parsed, publish, read, read_results, written
from benchmarks.harness.readme import excerpt, filled, rendered
from benchmarks.registry import EXPERIMENTS

ROOT = Path(__file__).parents[3]
DOCUMENT = "# Title\n\n<!-- tiny:begin -->\nold\n<!-- tiny:end -->\n\nAfter.\n"
VALUES = {"a": {0: 0.1234567, 1: 0.2}, "b | c": {0: 0.5, 1: 0.75}}


@pytest.fixture
def load(experiment):
    return lambda name: experiment


@pytest.fixture
def render(load):
    return lambda results: rendered(results, load)


@pytest.fixture
def published(tmp_path, stored, render, load):
    """A published result and a README with two of its parts."""
    results = read_results(stored(tmp_path / "results", VALUES))
    publish(results, "stored", render, tmp_path / "published")
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n<!-- stored/Accuracy:begin -->\n<!-- stored/Accuracy:end -->\nBetween.\n"
                      "<!-- stored/tables:begin -->\n<!-- stored/tables:end -->\n")  # fmt: skip
    readme.write_text(filled(readme, load, tmp_path / "published")[0])
    return readme


def test_the_readme_of_the_project_is_what_its_published_results_say():
    from benchmarks.harness.registered import load

    assert filled(ROOT / "README.md", lambda name: load(name, EXPERIMENTS), FOLDER)[1] == []


def test_publishing_and_filling_gives_the_tables_of_the_report(published, tmp_path):
    text = published.read_text()
    source = "`python -m benchmarks run stored` at commit 0123456.\n"  # not the folder of one machine
    assert text.count(source) == 2
    assert text.count("| a¹     |     0.162 ± 0.054 |") == 2
    assert text.count("| b \\| c | **0.625 ± 0.177** |") == 2
    assert text.count("¹ a <script>") == 2
    assert "Words." not in text
    assert "The end." not in text
    assert "dots.png" not in text
    assert "/somewhere" not in (tmp_path / "published" / "stored.json").read_text()


def test_a_changed_digit_is_found_by_its_name(published, tmp_path, load):
    folder = tmp_path / "published"
    assert filled(published, load, folder)[1] == []
    published.write_text(published.read_text().replace("0.162", "0.163", 1))
    assert filled(published, load, folder)[1] == ["stored/Accuracy"]


def test_a_changed_published_number_is_found_too(published, tmp_path, load):
    path = tmp_path / "published" / "stored.json"
    path.write_text(path.read_text().replace("0.75", "0.85"))
    assert filled(published, load, tmp_path / "published")[1] == ["stored/Accuracy", "stored/tables"]


def test_a_marker_of_nothing_and_a_result_without_marker_are_errors(published, tmp_path, load):
    folder, text = tmp_path / "published", published.read_text()
    published.write_text(text + "<!-- stord:begin -->\n<!-- stord:end -->\n")
    with pytest.raises(UsageError, match="marker 'stord': unknown published result 'stord'; did you mean 'stored'"):
        filled(published, load, folder)
    published.write_text("nothing")
    with pytest.raises(UsageError, match="has no place in"):
        filled(published, load, folder)
    published.write_text(text.replace("stored/Accuracy", "stored/Acuracy"))
    with pytest.raises(UsageError, match="unknown part of a report 'Acuracy'; did you mean 'Accuracy'"):
        filled(published, load, folder)


def test_a_published_file_keeps_what_results_say(tmp_path, stored):
    records = [{"metric": "curve", "value": 0.1 * step, "step": step, "row": "x"} for step in range(3)]
    records += [{"metric": "twice", "value": value, "step": None} for value in (1.0, 2.0)]
    values = {"a": {0: records, 1: [{"metric": "other", "value": float("nan"), "step": None}]}, "b": {0: None}}
    results = read_results(stored(tmp_path, values))
    again = parsed(written(results))
    told = [[repr(sorted(row.items(), key=str)) for row in some.rows] for some in (again, results)]  # nan is not nan
    assert told[0] == told[1]
    assert again.labels == ("a", "b")
    assert again.missing == 1
    assert again.config("a") == {"class": "Config", "label": "a"}
    assert [header["seconds"] for header in again.headers] == [1.0, 2.0]


def test_steps_before_the_last_are_dropped_unless_the_report_needs_them(tmp_path, stored):
    records = [{"metric": "loss", "value": 1.23456789 * step, "step": step} for step in range(4)]
    results = read_results(stored(tmp_path / "results", {"a": {0: records}}))
    path, dropped = publish(results, "short", lambda some: f"{some.final('loss', 'a').mean:.2f}", tmp_path)
    assert [(row["step"], row["value"]) for row in read(path).rows] == [(3, 3.7037)]
    assert dropped.startswith("records before the last of each series, numbers rounded to 6")
    path, _ = publish(results, "exact", lambda some: f"{some.final('loss', 'a').mean:.9f}", tmp_path)
    assert [row["value"] for row in read(path).rows] == [1.23456789 * 3]
    path, _ = publish(results, "long", lambda some: str(len(some.curve("loss", "a"))), tmp_path)
    assert len(read(path).rows) == 4


def test_metrics_that_the_report_does_not_ask_for_are_dropped_unless_it_needs_them(tmp_path, stored):
    records = [{"metric": name, "value": 1.0, "step": None} for name in ("loss", "time")]
    results = read_results(stored(tmp_path / "results", {"a": {0: records}}))
    path, dropped = publish(results, "loss", lambda some: str(some.final("loss", "a")), tmp_path)
    assert read(path).metrics == ("loss",)
    assert dropped.startswith("metrics that no table takes")
    path, _ = publish(results, "both", lambda some: str(some.metrics), tmp_path)
    assert read(path).metrics == ("loss", "time")


def test_results_that_stay_large_are_refused(tmp_path, stored):
    records = [{"metric": f"metric {k}", "value": 1.0, "step": None} for k in range(LARGEST // 40)]
    results = read_results(stored(tmp_path / "results", {"a": {0: records}}))
    with pytest.raises(UsageError, match="no short form of 'a' gives the tables that all records give below 200 kB"):
        publish(results, "a", lambda some: str([some.final(name, "a") for name in some.metrics]), tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_what_is_no_published_file_says_so(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"manifest": {}}))
    with pytest.raises(UsageError, match="is not a published result"):
        read_results(path)


def test_the_command_publishes_fills_and_checks(tmp_path, monkeypatch, capsys, stored, experiments):
    monkeypatch.setattr("benchmarks.harness.published.FOLDER", tmp_path / "published")
    monkeypatch.setattr("benchmarks.harness.published.FIGURES", tmp_path / "figures")
    (stored(tmp_path / "results", VALUES) / "dots.png").write_bytes(b"PNG")
    readme = tmp_path / "README.md"
    readme.write_text(before := DOCUMENT.replace("tiny", "short"))
    command = ["publish", str(tmp_path / "results"), "--as", "short", "--figure"]
    assert main([*command, "dot.png"], experiments) == 2
    assert "there is no figure dot.png" in capsys.readouterr().err
    assert main([*command, "dots.png"], experiments) == 0
    assert "numbers rounded to 6 significant digits" in capsys.readouterr().out
    assert (tmp_path / "figures" / "short-dots.png").read_bytes() == b"PNG"
    assert main(["readme", "--check", str(readme)], experiments) == 1
    assert "'short' is not what its published results say" in capsys.readouterr().err
    assert readme.read_text() == before
    assert main(["readme", str(readme)], experiments) == 0
    assert main(["readme", "--check", str(readme)], experiments) == 0
    assert "old" not in readme.read_text()


def test_an_excerpt_of_an_incomplete_run_says_so():
    headers = ({"commit": "0123456789"}, {"commit": "9876543210-dirty"})
    results = Results((), (), headers, {"command": "run", "units": [1, 2, 3]})
    assert excerpt("# T\n\nText", results) == (
        "`run` at commits 0123456, 9876543-dirty. 1 of 3 units are missing.\n\nText"
    )


def test_text_between_markers_is_replaced_and_nothing_else():
    once = replaced(DOCUMENT, "tiny", "new", Path("README.md"))
    assert once == "# Title\n\n<!-- tiny:begin -->\n\nnew\n\n<!-- tiny:end -->\n\nAfter.\n"
    assert replaced(once, "tiny", "new", Path("README.md")) == once


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
