"""What is kept of each commit, and what a report on speed says of the one before."""

import random
import statistics
from dataclasses import replace

import pytest

from benchmarks.experiments.speed.changes import noise
from benchmarks.experiments.speed.report import report
from benchmarks.harness import Results, UsageError, published
from benchmarks.harness.command import main
from benchmarks.harness.published import predecessor, publish_folder
from benchmarks.harness.published_text import written

WORKS = {"naive": 1.0, "curvature_ewc": 1.2, "ewc_separate": 7.0, "ewc_online": 1.3, "idle": 1.0}
MACHINE = {"device": {"cpu": "one", "gpu": None}, "torch": "2.6"}


def speeds(day, ratios, noises=0.01, label="MLP", **manifest):
    """Results of speed that began on that day of a month."""
    found = {f"step/{name}/ratio": value for name, value in ratios.items()}
    found |= {f"step/{name}/noise": noises for name in ratios}
    rows = [{"metric": m, "value": v, "step": None, "label": label, "seed": 0} for m, v in found.items()]
    header = {"label": label, "seed": 0, "config": {}, "started": f"2026-01-{day:02}", "commit": f"{day:040}"}
    units = [{"label": label, "seed": 0}]
    return Results((label,), tuple(rows), (header,), {"experiment": "speed", "units": units, **MACHINE, **manifest})


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """kept(results) keeps them in the history of the experiment."""
    monkeypatch.setattr(published, "FOLDER", tmp_path)

    def keep(results):
        path = tmp_path / "speed" / "history" / f"{published.dated(results)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(results))

    return keep


def changed(results):
    """The rows of the table of changes, without its head."""
    section = report(results, None).partition("## Slower and faster")[2]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_what_changed_by_more_than_its_noise_stands_below_the_table_slowest_first(kept):
    kept(speeds(1, dict.fromkeys(WORKS, 1.0)))
    kept(speeds(2, WORKS))
    now = {"naive": 1.0, "curvature_ewc": 1.3, "ewc_separate": 3.5, "ewc_online": 1.5, "idle": 1.0}
    assert [row[1:] for row in changed(speeds(3, now))] == [
        ["1.30", "1.50", "+15 %", "**slower**"], ["7.00", "3.50", "-50 %", "faster"]
    ]  # fmt: skip
    assert "2026-01-02-0000000" in report(speeds(3, now), None)
    assert changed(speeds(3, WORKS)) == []
    assert [row[2] for row in changed(speeds(3, now, noises=0.05))] == ["3.50"]  # 3 √(0.01² + 0.05²) > ln 1.15


def test_results_are_compared_with_earlier_ones_of_their_kind_and_rather_of_their_processor(kept):
    now = speeds(9, WORKS)
    assert predecessor(now) is None
    assert "No earlier commit is kept" in report(now, None)
    kept(now)
    kept(speeds(10, WORKS))
    kept(speeds(3, WORKS, label="another"))
    kept(speeds(4, WORKS, options={"quick": True}))
    assert predecessor(now) is None
    kept(speeds(6, WORKS, device={"cpu": "two", "gpu": None}, torch="2.5"))
    assert "differs: processor two, now one; torch 2.5, now 2.6." in report(now, None)
    kept(speeds(5, WORKS))
    assert predecessor(now)[0].startswith("2026-01-05")
    assert "differs" not in report(now, None)


def test_a_damaged_file_of_a_history_is_named_and_left_out(kept, tmp_path, capsys):
    kept(speeds(1, WORKS))
    whole = next(tmp_path.rglob("*.json"))
    whole.with_name("2026-01-02-cut.json").write_text(whole.read_text()[:500])
    nothing = replace(speeds(3, {}), headers=())
    whole.with_name("2026-01-03-empty.json").write_text(written(nothing))
    assert predecessor(speeds(9, WORKS))[0] == whole.stem
    told = capsys.readouterr().err
    assert "left out: " in told
    assert "2026-01-02-cut.json is not a published result" in told


def test_a_history_is_named_by_date_and_commit_and_needs_no_document(tmp_path, monkeypatch, stored, experiments):
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    folder = stored(tmp_path / "results", {"a": {0: 0.5}})
    assert main(["publish", str(folder), "--history"], experiments) == 0
    assert (tmp_path / "stored" / "history" / "2026-01-01-0123456.json").exists()
    assert published.files() == {}
    for name, figures in (("short", ()), (None, ("dots.png",))):
        with pytest.raises(UsageError, match="leave out --as, --figure"):
            publish_folder(folder, name, figures, experiments, history=True)


def test_a_checkout_with_changes_is_marked():
    results = speeds(1, WORKS)
    (header,) = results.headers
    assert published.dated(replace(results, headers=({**header, "commit": "ab" * 20 + "-dirty"},))) == (
        "2026-01-01-abababa-dirty"
    )


def test_noise_is_the_standard_deviation_of_the_median():
    drawn = random.Random(0)
    rounds = [[2 * 1.01 ** drawn.gauss(0, 1) for _ in range(15)] for _ in range(1000)]
    spread = statistics.stdev(map(statistics.median, rounds)) / 2
    assert statistics.mean(map(noise, rounds)) == pytest.approx(spread, rel=0.1)
    assert noise([1.3]) == 0
