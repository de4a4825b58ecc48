"""The merging experiment on digits: what is exact, how examples are parted, and the report."""

from dataclasses import replace

import pytest
import torch

from benchmarks.experiments.merging import experiment as merging
from benchmarks.experiments.merging.report import report

EXACT, SKEWED = merging.settings(quick=True)


@pytest.fixture(scope="module")
def found(results_of):
    few = [replace(config, tried=config.tried[:1]) for config in merging.rows(SKEWED)]
    return results_of(merging.experiment, [*merging.rows(EXACT), *few])


def test_heads_of_least_squares_merge_to_the_one_of_all_examples(found):
    part = {one.first["method"]: one for one in found.where(network=merging.SQUARED).each()}
    gap = {method: one.final("gap").mean for method, one in part.items()}
    assert max(gap["dense"], gap["Kronecker"], gap["EKFAC"]) < 1e-8
    assert min(gap["diagonal"], gap["average"]) > 0.1
    joint = part["joint training"].final("accuracy")
    assert part["Kronecker"].final("accuracy") == part["dense"].final("accuracy") == joint


def test_parts_are_apart_and_as_large_as_the_setting_says():
    targets = torch.arange(20_000) % 10
    for setting, sizes in ((EXACT, [100] * 5), (SKEWED, [33, 66, 100, 133, 166])):
        first, parts = merging.parted(targets, setting, torch.Generator().manual_seed(0))
        assert [len(part) for part in parts] == sizes
        every = torch.cat([first, *parts])
        assert len(every.unique()) == len(every)
        kinds = [len(targets[part].unique()) for part in parts]
        assert max(kinds) == 2 if setting is EXACT else min(kinds) > 2
        assert len(targets[torch.cat(parts)].unique()) == 10


def test_the_report_has_both_kinds_of_loss_and_a_figure(found, tmp_path):
    written = report(found, tmp_path)
    assert "## Squared error" in written
    assert f"### {merging.SMALL}" in written
    assert "| EKFAC, slope " in written
    assert written.count("uncorrected\nfor their number, 8)") == 1  # each structure without and with the slope
    assert "\n\nNone.\n\n" in written  # of one seed nothing is beyond noise
    assert (tmp_path / "merging.png").exists()
    assert "## Softmax" not in report(found.where(network=merging.SQUARED), tmp_path)
