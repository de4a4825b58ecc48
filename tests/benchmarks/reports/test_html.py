"""The page of a report: one file, which a browser opens from disk without a network."""

import re

import pytest

from benchmarks.harness.command import main
from benchmarks.harness.report import Part, page, write_report
from benchmarks.harness.results import Summary, load
from benchmarks.harness.store import Store
from benchmarks.harness.tables import Column, table

VALUES = {"a": {0: 0.1, 1: 0.2}, "b": {0: 0.5, 1: 0.75}, "c": {0: 0.3, 1: 0.3}}
FROM_ELSEWHERE = re.compile(r"""(?:src|href)\s*=\s*["'](?!data:|\#)|url\(|@import|<link(?![^>]*"data:)""")


@pytest.fixture
def folder(tmp_path, stored, report):
    """A results folder with its report."""
    store = Store(stored(tmp_path / "out" / "stored", VALUES))
    write_report(report, load(store, "run"), store)
    return store.root


def part(markdown, folder):
    return page("A title", [Part("A title", markdown, folder)])


def test_the_page_refers_to_nothing_outside_itself(folder):
    html = (folder / "report.html").read_text()
    assert not FROM_ELSEWHERE.findall(html)
    assert html.count("data:image/png;base64,") == 1
    assert '<figcaption>Accuracy by label</figcaption>' in html
    assert '<a href="#accuracy">Accuracy</a>' in html
    assert '<h2 id="accuracy">' in html


def test_html_in_a_report_is_text(folder, tmp_path):
    assert "&lt;div&gt;a block&lt;/div&gt;" in part("<div>a block</div>", tmp_path)
    html = (folder / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<script>") == 1  # the page's own


def test_a_figure_that_is_absent_is_told_and_not_asked_for(tmp_path):
    html = part("![A figure](gone.png)", tmp_path)
    assert "<img" not in html
    assert "A figure (the figure gone.png is absent)" in html


def test_a_figure_from_outside_of_the_folder_does_not_enter_the_page(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"PNG")
    (tmp_path / "folder").mkdir()
    for place in ("../secret.png", str(tmp_path / "secret.png")):
        assert "<img" not in part(f"![A figure]({place})", tmp_path / "folder")


def test_tables_scroll_in_a_frame_and_keep_their_bars(tmp_path):
    html = part("| a | b |\n| :-- | --: |\n| \\|κ\\| | **1.0** |", tmp_path)
    assert re.search(r'<div class="table" tabindex="0">\s*<table>', html)
    assert "<td style=\"text-align: left;\">|κ|</td>" in html
    assert "<strong>1.0</strong>" in html


def test_the_title_of_the_page_is_that_of_the_report(folder):
    assert "<title>Stored (stored)</title>" in (folder / "report.html").read_text()


def test_marks_and_notes_lead_to_each_other(tmp_path):
    cells = [["Naive", 0.5], ["`a`", 0.5], ["b", 0.5], ["x³", 0.5]]
    tables = table([Column("name"), Column("value")], cells, {"Naive": "one", "`a`": "two *words*", "b": "one"})
    html = page("A title", [Part(name, f"{tables}\n\nText\n\n{tables}", None) for name in ("p", "q")])
    links, places = re.findall(r'href="#([^"]+)"', html), re.findall(r'\bid="([^"]+)"', html)
    assert len(places) == len(set(places))
    assert set(links) <= set(places)
    assert html.count('class="mark"') == 4 * (3 + 2)  # in cells and in notes
    name = "part-2-table-1-note-1"
    assert f'Naive<a class="mark" href="#{name}" id="{name}-from">¹</a></td>' in html
    assert f'b<a class="mark" href="#{name}">¹</a></td>' in html
    assert f'<p class="note" id="{name}"><a class="mark" href="#{name}-from">¹</a> one</p>' in html
    assert '<code>a</code><a class="mark"' in html
    assert '²</a> two <em>words</em></p>' in html
    assert "x³</td>" in html  # no mark, for no note has it


def test_one_page_holds_all_reports_of_a_folder_each_with_places_of_its_own(folder, capsys, stored, experiments):
    out = folder.parent
    stored(out / "again", {"a": {0: 0.5}})
    stored(out / "broken", {"a": {0: None}})
    assert main(["report", "--out", str(out)], experiments) == 1  # for the broken one
    printed = capsys.readouterr()
    assert "broken: none of the 1 units" in printed.err
    assert f"2 reports on one page: {out / 'report.html'}" in printed.out
    html = (out / "report.html").read_text()
    assert html.count("<details") == 2
    places = re.findall(r'\bid="([^"]+)"', html)
    assert len(places) == len(set(places))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(places)
    assert (out / "again" / "report.html").exists()


def test_nothing_to_report_on_says_what_to_run(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "Run something first: python -m benchmarks run NAME" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_fits_a_window_and_a_telephone(browser, tmp_path):
    """At 1,280 pixels nine columns as wide as those of the comparison stand in their frame without scrolling."""
    titles = ("strategy", "accuracy", "forgetting", "when learned", "less Naive", "p (Holm)", "verdict", "λ", "n")
    row = ["CurvatureEWC batched emp. Fisher, accumulate", *[Summary(-0.855, 0.022, 5)] * 3, 0.3, "0.00037",
           "**beyond noise**", "0.0001", 5]  # fmt: skip
    (tmp_path / "page.html").write_text(part(table([Column(title) for title in titles], [row] * 2), tmp_path))
    measured = "const box = document.querySelector('.table'); " \
               "return [document.documentElement.scrollWidth, box.scrollWidth - box.clientWidth]"  # fmt: skip
    for width, fits in ((1280, True), (400, False)):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "page.html").as_uri())
        page_width, hidden = browser.execute_script(measured)
        assert page_width == width
        assert (hidden == 0) == fits


@pytest.mark.slow
def test_a_browser_opens_the_page_from_disk_and_sorts_its_table(folder, browser):
    browser.get((folder / "report.html").as_uri())
    widths = browser.execute_async_script(
        "const images = [...document.images]; images.forEach(image => (image.loading = 'eager'));"
        "Promise.all(images.map(image => image.decode())).then(() => arguments[0](images.map(i => i.naturalWidth)))"
    )
    assert len(widths) == 1
    assert widths[0] > 100
    assert len(browser.find_elements("css selector", ".table table")) == 1
    names = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"
    assert browser.execute_script(names) == ["a¹", "b", "c"]
    browser.find_elements("css selector", "thead th")[1].click()
    assert browser.execute_script(names) == ["b", "c", "a¹"]  # 0.625, 0.300, 0.150
    browser.find_elements("css selector", "thead th")[1].click()
    assert browser.execute_script(names) == ["a¹", "c", "b"]
    requests = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert browser.execute_script(requests) == 0
    assert browser.get_log("browser") == []
