"""Results folders without a run, for the tests of what reads them."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks.harness.manifest import PACKAGES
from benchmarks.harness.store import Store
from benchmarks.harness.tables import Column, table
from benchmarks.registry import Registered


def write_results(folder, values, experiment="stored", **manifest):
    """A folder with units of `values[label][seed]`, a value, a mapping of metrics to values, or a list of records; None
    for a unit that has not finished."""
    store, units = Store(folder), []
    for label, seeds in values.items():
        for seed, value in seeds.items():
            digest = f"{len(units):012d}"
            units.append({"label": label, "seed": seed, "digest": digest, "seconds": 1.0, "peak_memory": 2**20})
            if value is None:
                continue
            named = value if isinstance(value, dict | list) else {"accuracy": value}
            records = named if isinstance(named, list) else [
                {"metric": name, "value": number, "step": None} for name, number in named.items()
            ]  # fmt: skip
            header = {
                "label": label, "seed": seed, "config": {"class": "Config", "label": label}, "seconds": 1.0 + seed,
                "peak_memory": 2**20, "started": "2026-01-01", "commit": "0123456789abcdef",
            }  # fmt: skip
            store.write_unit(digest, header, records)
    content = {
        "experiment": experiment, "command": f"python -m benchmarks run {experiment} --out /somewhere", "grid": "abc",
        "options": {"class": "Options", "seeds": 3}, "commit": "0123456789abcdef", "dirty": False, "cpus": 2,
        "device": {"cpu": "a processor", "gpu": None}, "unit_seconds": 1.0, "python": "3", "units": units,
        **dict.fromkeys(PACKAGES, "1.0"), **manifest,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    store.manifest.write_text(json.dumps(content))
    return folder


def report_of_accuracy(results, out):
    """The final accuracy of each label, with a figure and a heading."""
    finals = {label: results.final("accuracy", label) for label in results.labels}
    Image.new("RGB", (200, 100), "white").save(out / "dots.png")
    rows = [[label, final] for label, final in finals.items()]
    notes = {"a": "a <script>alert(1)</script> note"}
    tables = table([Column("label"), Column("accuracy", 3, max)], rows, notes)
    return f"# Stored\n\nWords.\n\n## Accuracy\n\n{tables}\n\n![Accuracy by label](dots.png)\n\n## Last\n\nThe end."


@pytest.fixture
def stored():
    return write_results


@pytest.fixture
def report():
    return report_of_accuracy


@pytest.fixture
def experiments(monkeypatch):
    """A registry of an experiment "stored", with that report."""
    module = SimpleNamespace(report=report_of_accuracy, experiment=None)
    monkeypatch.setitem(sys.modules, "stored_results", module)
    return {"stored": Registered("stored_results:experiment", "stored results", "stored_results:report")}
