"""What is published of results, and the places of the documents that it fills."""

import json

import pytest

from benchmarks.harness import Results, UsageError, published
from benchmarks.harness.command import main
from benchmarks.harness.published import (
    LARGEST,
    excerpt,
    fill,
    filled,
    publish,
    read,
    read_results,
    rendered,
)
from benchmarks.harness.published_text import parsed, written

SHOW = "<!-- [[[cog from benchmarks.harness.published import show; show({}) ]]] -->\n{}<!-- [[[end]]] -->\n"
VALUES = {"a": {0: 0.1234567, 1: 0.2}, "b | c": {0: 0.5, 1: 0.75}}


@pytest.fixture
def folder(tmp_path, monkeypatch, experiments):
    """Where that experiment publishes."""
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    monkeypatch.setattr(published, "EXPERIMENTS", experiments)
    return tmp_path / "stored" / "published"


@pytest.fixture
def document(tmp_path, stored, folder, experiments):
    """A document with two parts of a published result."""
    results = read_results(stored(tmp_path / "results", VALUES))
    publish(results, "stored", lambda some: rendered(some, experiments), folder)
    path = tmp_path / "README.md"
    parts = [SHOW.format(f'"stored", "{part}"', "") for part in ("Accuracy", "Accuracy")]
    path.write_text("Before.\n" + "Between.\n".join(parts))
    assert fill([path]) == 0
    return path


def test_publishing_and_filling_gives_the_tables_of_the_report(document, folder):
    text = document.read_text()
    source = "`python -m benchmarks run stored` at commit 0123456.\n"  # not the folder of one machine
    assert text.count(source) == 2
    assert text.count("| a¹     |     0.162 ± 0.054 |") == 2
    assert text.count("| b \\| c | **0.625 ± 0.177** |") == 2
    assert text.count("¹ a <script>") == 2
    assert text.startswith("Before.\n")
    for absent in ("Words.", "The end.", "dots.png"):
        assert absent not in text
    assert "/somewhere" not in (folder / "stored.json").read_text()


@pytest.mark.parametrize("place", ["README.md", "stored/published/stored.json"])
def test_a_changed_digit_in_a_document_or_a_published_file_is_found(document, tmp_path, capsys, place):
    assert fill([document], check=True) == 0
    path, before = tmp_path / place, document.read_text()
    path.write_text(path.read_text().replace("0.162", "0.163", 1).replace("0.75", "0.85"))
    assert fill([document], check=True) == 1
    assert f"{document}: not what its published results say." in capsys.readouterr().err
    assert (document.read_text() == before) == (place != "README.md")
    assert fill([document]) == 0
    assert fill([document], check=True) == 0


@pytest.mark.parametrize(("shown", "message"), [
    ('"stord"', "unknown published result 'stord'; did you mean 'stored'"),
    ('"stored", "Acuracy"', "unknown part of a report 'Acuracy'; did you mean 'Accuracy'"),
])  # fmt: skip
def test_what_there_is_not_is_an_error_that_names_the_nearest(document, shown, message):
    with pytest.raises(UsageError, match=f"README.md: {message}"):
        filled(document, SHOW.format(shown, ""))


def test_a_published_result_that_no_document_shows_is_an_error(document, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.published.DOCUMENTS", [document])
    assert fill() == 0
    document.write_text("nothing")
    with pytest.raises(UsageError, match=r'stored.json has no place in a document: show."stored". it'):
        fill()


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


def test_a_published_file_tells_configurations_by_what_changes_and_units_of_a_label_together():
    inner = {"class": "Inner", "depth": 1, "names": ["x"]}
    configs = [
        {"class": "Config", "label": "a", "inner": inner, "strength": 1},
        {"class": "Config", "label": "b", "inner": {**inner, "depth": 1.0}, "strength": True},
        {"class": "Config", "label": "c", "inner": {"class": "Other", "depth": 1}, "strength": None},
        {"class": "Config", "label": "d", "inner": {"depth": 2}, "strength": None},
        {"class": "Foreign", "label": "another"},
        {"class": "Foreign", "label": "another"},
    ]
    headers = tuple(
        {"label": label, "seed": seed, "seconds": 1.5, "peak_memory": seed, "started": "now",
         "commit": None if label == "c" else "0123" + label,
         "config": config}
        for label, config in zip("abcdef", configs)
        for seed in ([3] if label == "b" else [0, 1])
    )  # fmt: skip
    grid = [{"label": header["label"], "seed": header["seed"]} for header in headers]
    again = parsed(written(Results(tuple("abcdef"), (), headers, {"units": grid})))
    assert json.dumps([header["config"] for header in again.headers]) == json.dumps([h["config"] for h in headers])
    assert again.headers == headers
    assert again.manifest["units"] == grid


@pytest.mark.parametrize(("render", "kept"), [
    (lambda some: str(some.final("loss", "a").mean), [("loss", 3)]),
    (lambda some: str(len(some.curve("loss", "a"))), [("loss", step) for step in range(4)]),
    (lambda some: str(some.frame["value"].sum()), [*[("loss", step) for step in range(4)], ("time", None)]),
], ids=["finals", "curves", "all"])  # fmt: skip
def test_only_the_records_that_the_report_needs_are_published(tmp_path, stored, render, kept):
    records = [{"metric": "loss", "value": 1.23456789 * step, "step": step} for step in range(4)]
    records.append({"metric": "time", "value": 1.0, "step": None})
    results = read_results(stored(tmp_path / "results", {"a": {0: records}}))
    path, said = publish(results, "short", render, tmp_path)
    again = read(path)
    assert [(row["metric"], row["step"]) for row in again.rows] == kept
    assert again.final("loss", "a") == results.final("loss", "a")
    assert said.endswith(f"{len(kept)} of 5 records")


def test_a_metric_is_published_of_the_labels_that_the_report_takes_it_of(tmp_path, stored):
    values = {label: {0: {"loss": 0.5, "time": 1.0}} for label in "ab"}
    results = read_results(stored(tmp_path / "results", values))
    path, _ = publish(results, "short", lambda some: f"{len(some.select('loss'))} {some.final('time', 'b')}", tmp_path)
    assert [(row["label"], row["metric"]) for row in read(path).rows] == [("a", "loss"), ("b", "loss"), ("b", "time")]


def test_results_that_stay_large_are_refused(tmp_path, stored):
    records = [{"metric": f"metric {k}", "value": 1.0, "step": None} for k in range(LARGEST // 40)]
    results = read_results(stored(tmp_path / "results", {"a": {0: records}}))
    with pytest.raises(UsageError, match=r"the report of 'a' needs take .* expected at most 200 kB"):
        publish(results, "a", lambda some: str([some.final(name, "a") for name in some.metrics]), tmp_path)
    assert not (tmp_path / "a.json").exists()


def test_what_is_no_published_file_says_so(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"manifest": {}}))
    with pytest.raises(UsageError, match="is not a published result"):
        read_results(path)


def test_the_command_publishes_fills_and_checks(tmp_path, capsys, stored, folder, experiments):
    (stored(tmp_path / "results", VALUES) / "dots.png").write_bytes(b"PNG")
    readme = tmp_path / "README.md"
    readme.write_text(before := SHOW.format('"short"', "old\n"))
    command = ["publish", str(tmp_path / "results"), "--as", "short", "--figure"]
    assert main([*command, "dot.png"], experiments) == 2
    assert "there is no figure dot.png" in capsys.readouterr().err
    assert main([*command, "dots.png"], experiments) == 0
    assert "4 of 4 records" in capsys.readouterr().out
    assert (folder / "short-dots.png").read_bytes() == b"PNG"
    assert main(["readme", "--check", str(readme)], experiments) == 1
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
