"""How the price of the past grows: what is foreseen, what is run, and the exponents."""

from dataclasses import replace

import pytest
import torch

from avalanche_curv import Kronecker, ParameterSpace
from benchmarks.experiments.cost.experiment import CostOptions, experiment
from benchmarks.experiments.cost.models import MLP
from benchmarks.experiments.cost.report import report
from benchmarks.experiments.cost.scale import HIDDEN, Penalised, of_size, of_tasks, scalings
from benchmarks.experiments.cost.scale_report import fitted

KEPT = {config.label: config for config in scalings()}


def by_metric(records):
    return {record["metric"]: record for record in records}


def test_sizes_are_powers_of_ten():
    sizes = [sum(p.numel() for p in MLP(h, h).build().parameters()) for h in HIDDEN[:4]]
    assert sizes == pytest.approx([1e3, 1e4, 1e5, 1e6], rel=0.05)
    assert 2 * HIDDEN[-1] ** 2 == pytest.approx(1e8, rel=0.01)


@pytest.mark.parametrize(("label", "hidden", "reason"), [
    ("dense", 221, "37.5 GiB"), ("top 10", 20_000, "29.8 GiB"), ("Kronecker, list", 7068, "57 s"),
    ("projection, 10 directions", 20_000, "29.8 GiB"),
])  # fmt: skip
def test_what_is_too_much_is_foreseen_and_not_run(label, hidden, reason):
    records = by_metric(of_size(KEPT[label], hidden))
    assert records.keys() == {"size/foreseen", "size/left_out"}
    assert records["size/left_out"]["reason"] == reason


def test_bytes_foreseen_are_those_held_beside_the_anchor():
    for label, config in KEPT.items():
        records = by_metric(of_size(replace(config.quick(), seconds=0.0), 20))
        size = records["size/foreseen"]["step"]
        if isinstance(config.keeping, Penalised) and label != "matrix-free":
            assert records["size/bytes"]["value"] == pytest.approx(records["size/foreseen"]["value"] + 4 * size), label
        assert records["size/step_ratio"]["value"] > 0


def test_a_list_grows_with_the_tasks_and_one_pair_does_not():
    held = {}
    for label in ("Kronecker, list", "Kronecker, one pair"):
        config = replace(KEPT[label].quick(), seconds=0.0, counts=(2, 6))
        values = [record["value"] for record in of_tasks(config) if record["metric"] == "tasks/bytes"]
        held[label] = values
    space = ParameterSpace.of(MLP(20, 20).build())
    assert held["Kronecker, one pair"][0] == held["Kronecker, one pair"][1]
    assert held["Kronecker, list"][1] - held["Kronecker, list"][0] == (
        4 * (Kronecker().bytes(space, 4) - 4 * space.size)  # four more terms, and one diagonal
    )


def test_exponents_are_those_of_power_laws():
    powers = [(10**k, 3 * 10 ** (1.5 * k)) for k in range(5)]
    assert str(fitted(powers)) == "1.50 (1.50 to 1.50)"
    assert fitted([(1, 100), (10, 100), *powers[2:]]).exponent == pytest.approx(1.5)  # of the three largest
    assert fitted(powers[:1]) is None


def test_the_report_says_what_was_run_and_what_is_foreseen(results_of, tmp_path):
    quick = {config.label: config for config in experiment.configs(CostOptions(part="scale", quick=True))}
    assert list(quick) == list(KEPT)
    torch.manual_seed(0)
    configs = [replace(quick["diagonal"], seconds=0.0), replace(quick["dense"], sizes=(8, 221), counts=(1,))]
    results = results_of(experiment, configs)
    written = report(results, tmp_path)
    assert (tmp_path / "scale.png").exists()
    section = written.partition("## By size")[2].partition("## At")[0]
    rows = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("|")}
    assert "37.5 GiB, not run" in rows["dense"]
    assert "MiB" in rows["diagonal"]
    assert results.curve("size/bytes", "diagonal")[0][0] == 2 * 8**2 + 12 * 8 + 10
