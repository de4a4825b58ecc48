"""A comparison of two results folders against tests that scipy and paper give."""

import math

import pytest
from scipy import stats

from benchmarks.harness import UsageError
from benchmarks.harness.command import main
from benchmarks.harness.difference import difference
from benchmarks.harness.significance import compared, holm

A = {0: 0.50, 1: 0.52, 2: 0.47, 3: 0.55}
B = {0: 0.61, 1: 0.60, 2: 0.59, 3: 0.63}


def row(markdown, heading, label):
    """The cells of a label in the table below a heading."""
    lines = markdown.partition(f"### {heading}\n")[2].splitlines()
    line = next(line for line in lines if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_shared_seeds_are_paired_as_scipy_pairs_them():
    found = compared(A, {**B, 9: 0.0})  # seed 9 has no partner
    ours, theirs = list(A.values()), list(B.values())
    gaps = [b - a for a, b in zip(ours, theirs)]
    assert found.name == "paired"
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0.0).pvalue)
    assert found.difference == pytest.approx(0.0975)
    assert found.effect == pytest.approx(0.0975 / math.sqrt(sum((g - 0.0975) ** 2 for g in gaps) / 3))
    assert (found.a.n, found.b.n) == (4, 4)


def test_seeds_that_are_not_shared_are_compared_by_welch():
    other = {seed + 10: value for seed, value in list(B.items())[:3]}
    found = compared(A, other)
    variances = [stats.tvar(list(values.values())) for values in (A, other)]
    error = math.sqrt(variances[0] / 4 + variances[1] / 3)
    degrees = error**4 / ((variances[0] / 4) ** 2 / 3 + (variances[1] / 3) ** 2 / 2)
    assert found.name == "Welch"
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.difference) / error, degrees))
    assert found.effect == pytest.approx(found.difference / math.sqrt(sum(variances) / 2))


def test_a_difference_without_spread_is_named_and_not_tested():
    values = {0: 0.1, 1: 0.45, 2: 0.8}
    shifted = compared(values, {seed: value + 0.7 for seed, value in values.items()})  # constant up to rounding
    apart = compared(dict.fromkeys(range(4), 0.3), dict.fromkeys(range(10, 14), 1.0))
    for found in (shifted, apart):
        assert (found.p, found.effect) == (None, None)
        assert found.difference == pytest.approx(0.7)
        assert found.verdict(None) == "constant difference"
    assert compared(A, {**A, 9: 0.0}).verdict(None) == "identical"  # in the seeds that both have


@pytest.mark.parametrize("b", [{0: 2.0}, {0: 1.5, 1: 2.5}, {0: 1.5, 1: 2.6}, {5: 1.5, 6: 2.5}, {0: 1.5, 6: 2.5}])
def test_fewer_than_three_seeds_are_not_tested(b):
    found = compared({0: 1.0, 1: 2.0}, b)
    assert found.p is None
    assert found.verdict(None) == "too few seeds"


def test_what_cannot_be_tested_says_so():
    assert compared({0: 1.0, 1: 2.0}, {0: math.nan, 1: 2.0}).verdict(None) == "undefined"
    assert compared({0: math.nan, 1: 2.0}, {0: math.nan, 1: 2.0}).verdict(None) == "identical"


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order():
    assert holm([0.04, 0.005, 0.03, 0.01]) == pytest.approx([0.06, 0.02, 0.06, 0.03])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.04, math.nan, 0.03]) == pytest.approx([0.06, math.nan, 0.06], nan_ok=True)


def test_a_section_counts_the_tests_that_were_made(tmp_path, stored):
    a = stored(tmp_path / "a", {"x": A, "shifted": A, "lost": A})
    b = stored(tmp_path / "b", {"x": B, "shifted": {s: v + 1 for s, v in A.items()}, "lost": {**A, 0: math.nan}})
    written = difference(a, b)
    x, shifted = (row(written, "accuracy", label) for label in ("x", "shifted"))
    assert x[6] == x[7]  # a single test is not corrected
    assert shifted[5:] == ["n = 4", "–", "–", "constant difference"]
    assert "3 comparisons: 1 beyond noise, 1 constant difference, 1 undefined." in written


def test_the_table_corrects_over_all_tests_of_the_section(tmp_path, stored):
    noise = {0: 0.50, 1: 0.53, 2: 0.46, 3: 0.55}
    a = stored(tmp_path / "a", {"x": A, "y": A, "same": A})
    b = stored(tmp_path / "b", {"x": B, "y": noise, "same": A})
    written = difference(a, b)
    p = [stats.ttest_rel(list(A.values()), list(other.values())).pvalue for other in (B, noise)]
    x, y, same = (row(written, "accuracy", label) for label in ("x", "y", "same"))
    assert (x[6], x[7], x[8]) == (f"{p[0]:.2g}", f"{2 * p[0]:.2g}", "**beyond noise**")
    assert (y[6], y[7], y[8]) == (f"{p[1]:.2g}", f"{p[1]:.2g}", "within noise")
    assert (same[3], same[8]) == ("+0", "identical")
    assert "corrected for the 2 tests of this section (Holm 1979)" in written
    assert "3 comparisons: 1 beyond noise, 1 within noise, 1 identical." in written


def test_units_environment_and_configurations_that_differ_are_named(tmp_path, stored):
    a = stored(tmp_path / "a", {"x": A, "old": {0: 1.0}}, torch="2.6", device={"cpu": "slow", "gpu": None})
    b = stored(tmp_path / "b", {"x": {**B, 7: 1.0}, "new": {0: 1.0, 1: 1.0}}, torch="2.7", device={"cpu": "fast"})
    unit = b / "units" / "000000000000.jsonl"
    unit.write_text(unit.read_text().replace('"class": "Config"', '"class": "Other"'))
    written = difference(a, b)
    for line in (
        "- torch: `2.6` → `2.7`", "- device.cpu: `slow` → `fast`", "- only in A: old, seed 0",
        "- only in B: new, seeds 0, 1", "- only in B: x, seed 7", "- x: `class` `Config` → `Other`",
    ):  # fmt: skip
        assert line in written.splitlines()
    assert "numpy" not in written


def test_timings_are_apart_and_last(tmp_path, stored):
    values = {"x": {seed: {"seconds": 1.0 + seed, "accuracy": value} for seed, value in A.items()}}
    written = difference(stored(tmp_path / "a", values), stored(tmp_path / "b", values))
    results, timings = written.split("## Timings")
    assert "- accuracy: x" in results
    assert "seconds" not in results.partition("## Results")[2]
    assert "- seconds: x" in timings
    assert "- peak memory of a unit, MiB: x" in timings


def test_curves_enter_by_their_last_value_where_they_are_asked_for(tmp_path, stored):
    def curve(shift):
        return {s: [{"metric": "loss", "value": t + shift * (1 + s), "step": t} for t in range(3)] for s in range(3)}

    a, b = (stored(tmp_path / str(shift), {"x": curve(shift)}) for shift in (0.0, 0.5))
    assert row(difference(a, b, ["loss"]), "loss", "x")[1:4] == ["2.0000 ± 0.0000", "3.0000 ± 0.5000", "+1"]


def test_a_command_prints_it_and_writes_a_page(tmp_path, capsys, stored):
    a, b = stored(tmp_path / "a", {"x": A}), stored(tmp_path / "b", {"x": B})
    assert main(["diff", str(a), str(b), "--html", str(tmp_path / "diff.html")]) == 0
    assert "**beyond noise**" in capsys.readouterr().out
    assert "<strong>beyond noise</strong>" in (tmp_path / "diff.html").read_text()


def test_folders_without_results_and_unknown_metrics_are_errors(tmp_path, capsys, stored):
    a, none = stored(tmp_path / "a", {"x": A}), stored(tmp_path / "none", {"x": {0: None}})
    assert main(["diff", str(a), str(tmp_path / "nowhere")]) == 2
    assert "holds no results: expected a folder with manifest.json" in capsys.readouterr().err
    assert main(["diff", str(a), str(none)]) == 2
    assert "none of the 1 units" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        difference(a, a, ["acuracy"])
