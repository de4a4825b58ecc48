"""Results folders that are damaged or come from elsewhere: what can be read is reported, text stays text, and no file
from outside of the folder enters a page."""

import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from benchmarks.harness import UsageError
from benchmarks.harness.command import main
from benchmarks.harness.published import read
from benchmarks.harness.report import Part, page
from benchmarks.harness.results import load
from benchmarks.harness.store import Store

PICTURE = b"\x89PNG\r\n\x1a\n"
HEADER = '{"label": "b", "seed": 0, "config": {}, "seconds": 1.0, "peak_memory": 1}\n'
RECORD = '{"metric": "accuracy", "value": 0.5, "step": null}\n'
BROKEN = {
    "empty": (b"", "empty"),
    "cut off": ((HEADER + RECORD)[:-20].encode(), "cut off"),
    "cut off in a record": ((HEADER + RECORD[:-20] + "\n").encode(), "not JSON, or cut off"),
    "not UTF-8": (HEADER.encode("utf-16"), "not UTF-8"),
    "a list": (b"[1, 2]\n", "expected a header, got [1, 2]"),
    "no label": (b"{}\n", "expected a header with a value of type str as 'label', got {}"),
    "of another unit": (HEADER.replace('"b"', '"c"').encode(), "is of 'c' with seed 0, expected 'b'"),
    "another seed": (HEADER.replace("0", "7", 1).encode(), "is of 'b' with seed 7, expected 'b' with seed 0"),
    "seconds of text": (HEADER.replace("1.0", '"long"').encode(), "expected a number as 'seconds', got 'long'"),
    "a record that is a list": ((HEADER + "[]\n").encode(), "expected a record"),
    "no metric": ((HEADER + '{"value": 1.0, "step": null}\n').encode(), "of type str as 'metric'"),
    "no value": ((HEADER + '{"metric": "accuracy", "step": null}\n').encode(), "a number as 'value', got None"),
    "no step": ((HEADER + '{"metric": "accuracy", "value": 1}\n').encode(), "expected a record with a step"),
    "a value of text": ((HEADER + RECORD.replace("0.5", '"0.5"')).encode(), "a number as 'value', got '0.5'"),
    "a huge value": ((HEADER + RECORD.replace("0.5", "9" * 400)).encode(), "a number as 'value', got one of"),
    "digits beyond all bounds": ((HEADER + RECORD.replace("0.5", "9" * 5000)).encode(), "Exceeds the limit"),
    "nested beyond all bounds": (b"[" * 100_000 + b"\n", "recursion"),
}
MANIFESTS = {
    "empty": b"", "cut off": b'{"experiment": "stored", "uni', "a list": b"[]", "not UTF-8": b"\xff\xfe{}",
    "no units": b'{"experiment": "stored", "command": "run"}',
    "units of text": b'{"experiment": "stored", "command": "run", "units": ["a"]}',
    "a place elsewhere": b'{"experiment": "stored", "command": "run", "units": '
    b'[{"label": "a", "seed": 0, "digest": "../../secret"}]}',
}  # fmt: skip


@pytest.mark.parametrize(("written", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_unit_is_named_and_left_out(tmp_path, stored, written, reason):
    store = Store(stored(tmp_path / "out", {"a": {0: 0.25}, "b": {0: 0.5}}))
    store.unit("000000000001").write_bytes(written)
    results = load(store, "run")
    assert results.final("accuracy", "a").mean == 0.25
    assert results.missing == 1
    (problem,) = results.left_out
    assert problem.startswith(str(store.unit("000000000001")))
    assert reason in problem


def test_values_that_are_not_finite_are_values(tmp_path, stored):
    store = Store(stored(tmp_path / "out", {"a": {0: float("nan")}, "b": {0: float("inf")}}))
    results = load(store, "run")
    assert not results.left_out
    assert results.final("accuracy", "b").mean == float("inf")


def test_reports_and_differences_go_on_without_what_is_broken(tmp_path, capsys, stored, experiments):
    out, other = tmp_path / "out", stored(tmp_path / "other", {"a": {0: 0.5}, "b": {0: 0.5}})
    store = Store(stored(out / "stored", {"a": {0: 0.25}, "b": {0: 0.5}, "c": {0: 0.75}}))
    broken = [store.unit(f"{number:012d}") for number in (1, 2)]
    broken[0].write_text("{")
    broken[1].unlink()
    broken[1].mkdir()  # a folder in place of the file
    assert main(["report", "--out", str(out)], experiments) == 1
    errors = capsys.readouterr().err
    assert main(["diff", str(out / "stored"), str(other)], experiments) == 1
    printed = capsys.readouterr()
    for path in broken:
        assert f"left out: {path}: " in errors
        assert f"left out: {path}: " in printed.err
    assert "2 files could not be read; all others are in the report." in printed.err
    assert "0.250" in (out / "stored" / "report.md").read_text()
    assert "> 2 of 3 units are missing" in (out / "stored" / "report.md").read_text()
    assert "+0.25" in printed.out


@pytest.mark.parametrize("written", MANIFESTS.values(), ids=MANIFESTS)
def test_a_broken_manifest_is_one_line_and_costs_no_other_folder(tmp_path, capsys, stored, experiments, written):
    broken = stored(tmp_path / "out" / "broken", {"a": {0: 0.25}}) / "manifest.json"
    broken.write_bytes(written)
    assert main(["diff", str(broken.parent), str(broken.parent)], experiments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken}: ")
    assert error.endswith("takes the units that have finished as they are: python -m benchmarks run NAME\n")
    stored(tmp_path / "out" / "stored", {"a": {0: 0.25}})
    assert main(["report", "--out", str(tmp_path / "out")], experiments) == 1
    printed = capsys.readouterr()
    assert str(broken) in printed.err
    assert "1 reports on one page" in printed.out


@pytest.mark.parametrize("key", ["python", "torch", "device", "cpus", "grid", "unit_seconds", "options"])
def test_a_manifest_of_another_version_may_lack_what_only_tells_the_origin(tmp_path, stored, experiments, key):
    manifest = stored(tmp_path / "out" / "stored", {"a": {0: 0.25}}) / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != key}))
    assert main(["report", "--out", str(tmp_path / "out")], experiments) == 0


def test_a_report_that_fails_on_foreign_records_leaves_its_traceback_in_a_file(tmp_path, capsys, stored, experiments):
    def report(results, out):
        return results.first["stream"]

    folder = stored(tmp_path / "out" / "stored", {"a": {0: 0.25}})
    stored(tmp_path / "out" / "good", {"a": {0: 0.25}}, experiment="good")
    sys.modules["stored_results"].broken = report
    both = {"stored": replace(experiments["stored"], reporter="stored_results:broken"), "good": experiments["stored"]}
    assert main(["report", "--out", str(tmp_path / "out")], both) == 1
    error = capsys.readouterr().err
    trace = folder / "report.error.txt"
    assert f"the report on {folder} failed (KeyError: 'stream'): {trace} has the traceback" in error
    assert 'in report\n    return results.first["stream"]' in trace.read_text()
    assert main(["report", "--out", str(tmp_path / "out")], experiments | {"good": experiments["stored"]}) == 0
    assert not trace.exists()


NOTHING = '{"manifest": [1], "grid": [], "configs": [], "units": [], "records": []}'


@pytest.mark.parametrize("text", ["{", "[]", NOTHING])
def test_a_published_file_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "published.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not a published result"):
        read(path)


LABELS = (
    "![a](secret.png)", "x\n\n![a](secret.png)\n\ny", "x\n\n![a](sub/../secret.png)\n\ny", "![a](/etc/passwd)",
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "a | b | c", "x\n\n# y\n\n<img src=x onerror=alert(1)>",
    "<http://evil.example>", "![a][r]\n\n[r]: secret.png", "\\[x](https://evil.example)", "\\\\[x](https://evil.example)",
)  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
def test_the_text_of_records_is_text_in_reports_and_pages(tmp_path, monkeypatch, stored, experiments, label):
    monkeypatch.chdir(tmp_path)
    Path("secret.png").write_bytes(PICTURE + b"a secret")
    record = {"metric": "accuracy", "value": 0.5, "step": None, "note": label}
    folder = stored(tmp_path / "out" / "stored", {"a": {0: 0.2}, label: {0: [record]}}, grid=label, python=label)
    (folder / "secret.png").symlink_to(tmp_path / "secret.png")
    other = stored(tmp_path / "other", {"a": {0: 0.3}, f"{label}2": {0: [record]}}, grid=label, commit=label)
    assert main(["report", "--out", "out"], experiments) == 0
    assert main(["diff", str(folder), str(other), "--html", "diff.html"], experiments) == 0
    markdown = (folder / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if "| 0.500 |" in line.replace("**", ""))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # two cells
    pages = [Path("diff.html").read_text(), (folder / "report.html").read_text(), Path("out/report.html").read_text()]
    for html in pages:
        body = html.partition("<main>")[2].partition("</main>")[0]
        pictures = re.findall("<img [^>]*>", body)
        assert [one[:45] for one in pictures] == ['<img alt="Accuracy by label" src="data:image/p'[:45]] * len(pictures)
        assert not re.findall(r'<script|<a (?![^>]*href="#)|<h1[^>]*>y|YSBzZWNyZXQ|a secret', body)
        assert "\\[x" in label or " ".join(label.split()) in unescape(re.sub("<[^>]+>", "", body))


def test_only_links_into_the_web_and_pictures_of_the_folder_enter_a_page(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_text("a secret")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    figures = "![A](a.png)\n\n![B](b.png)\n\n![C](c.png)\n\n"
    links = "text ![D](a.png) [E](https://e.f) [F](javascript:alert) [G](file:///etc/passwd) [H](#a)"
    html = page("A title", [Part("A title", figures + links, tmp_path)])
    assert html.count("<img") == html.count("data:image/png") == 1
    assert "B (the figure b.png is absent)" in html
    assert re.findall(r'<a href="([^"]*)"', html) == ["https://e.f", "#a"]
    assert "text <span>D</span>" in html
