"""What each structure keeps: the grid, the strengths, and the course of a run."""

from dataclasses import replace

import pytest
import torch

from avalanche_curv import Diagonal
from benchmarks.experiments.cost.experiment import grid as cost_grid
from benchmarks.experiments.cost.models import MLP, ConvNet
from benchmarks.experiments.structures.experiment import (
    AT_ONCE,
    HELD_OUT,
    MODELS,
    NAIVE,
    STRUCTURES,
    Config,
    Setting,
    StructuresOptions,
    best_strengths,
    course,
    experiment,
    sequence,
    shown,
)
from benchmarks.experiments.structures.report import report
from benchmarks.harness import Results

TINY = Config("", "MLP", MLP(64, 4), NAIVE, Setting(1e-2, steps=4, tasks=3))


def accuracies(config, seed=0):
    torch.manual_seed(seed)
    return list(course(config, config.family.build(), sequence(config, seed)))


def test_a_strength_of_zero_is_naive_and_another_is_not():
    kept = replace(TINY, method="Diagonal()", structure=Diagonal(), strength=0.0)
    plain = accuracies(TINY)
    assert [len(row) for row in plain] == [1, 2, 3]
    assert accuracies(kept) == plain
    assert accuracies(replace(kept, strength=1e4)) != plain
    assert len(accuracies(replace(TINY, method=AT_ONCE))) == 1


def test_tasks_are_the_same_images_in_orders_of_their_own():
    (first, test), (second, _), _ = sequence(TINY, 3)
    generator = torch.Generator().manual_seed(3)
    order, other = torch.randperm(64, generator=generator), torch.randperm(64, generator=generator)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0][:, order.argsort()], second[0][:, other.argsort()])
    tuned = sequence(replace(TINY, setting=replace(TINY.setting, held_out=HELD_OUT)), 3)
    assert len(tuned[0][0][1]) == len(first[1]) - HELD_OUT
    assert torch.equal(tuned[0][1][0], first[0][-HELD_OUT:])  # tested on training images, not on the test images
    assert not torch.equal(tuned[0][1][1], test[1][:HELD_OUT])


def test_images_are_enlarged_to_what_a_model_takes():
    pixels = torch.rand(2, 64)
    assert torch.equal(shown(pixels, MLP(64, 4)), pixels)
    large = shown(pixels, ConvNet(16, (2, 2), 4))
    assert large.shape == (2, 1, 16, 16)
    torch.testing.assert_close(large.mean((1, 2, 3)), pixels.mean(1))


def test_the_models_are_those_of_cost_and_dense_is_tried_where_it_fits():
    priced = {config.label: config.model for config in cost_grid()}
    assert {name: family for name, (family, *_) in MODELS.items()} == {name: priced[name] for name in MODELS}
    configs = experiment.configs(StructuresOptions(strengths=(("conv net, EKFAC()", 30.0),)))
    dense = [config.model for config in configs if config.method == "Dense()"]
    assert dense == ["MLP 64-12-12-10"]
    assert next(config for config in configs if config.label == "conv net, EKFAC()").strength == 30.0
    works = {str(work.structure) for config in cost_grid() for work in config.works}
    assert {str(structure) for structure in STRUCTURES.values()} <= works


def test_the_best_strength_is_the_smallest_of_equal_ones_and_none_that_diverged():
    tried = {1.0: 0.5, 10.0: 0.7, 100.0: 0.7, 1000.0: float("nan")}
    rows = tuple(
        {"metric": "average_accuracy", "step": None, "value": value, "label": f"at {strength:g}", "seed": 0}
        for strength, value in tried.items()
    )
    headers = tuple(
        {"label": row["label"], "seed": 0, "config": {"model": "net", "method": "Diagonal()", "strength": strength}}
        for row, strength in zip(rows, tried)
    )
    assert best_strengths(Results(tuple(row["label"] for row in rows), rows, headers)) == {"net, Diagonal()": 10.0}


@pytest.fixture(scope="module")
def measured(results_of):
    configs = experiment.configs(StructuresOptions(quick=True))
    return results_of(experiment, [config for config in configs if config.model == "MLP 64-12-12-10"])


def test_the_report_has_a_row_for_each_structure_and_its_bytes_are_recorded(measured, tmp_path):
    written = report(measured, tmp_path)
    assert all(f"| {name}" in written for name in (NAIVE, AT_ONCE, *STRUCTURES))
    sizes = {row["row"]: row["value"] for row in measured.select("bytes", "MLP 64-12-12-10, Naive")}
    assert sizes["Diagonal()"] == 4 * 1066
    assert sizes["Dense()"] == 4 * 1066**2
