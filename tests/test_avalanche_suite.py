"""Avalanche's own tests of strategies pass with our plugins of strength 0 in every strategy, or are refused early."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = [
    "test_dictionary_mbatches.py", "test_losses.py", "test_regularization.py", "test_replay.py",
    "test_stream_completeness.py", "test_strategies.py", "test_update_utils.py",
]  # those that need no download and end within minutes
LONG = "not l2p"  # a vision transformer

REFUSED = {
    "TestDictionaryDatasets::test_dictionary_train_replay": "batches that are dictionaries",
    "ReplayTest::test_balancing": "a model of 784 inputs on data of 6, which is never called in no epochs of training",
    "StrategyTest::test_cope": "PPPloss, which keeps prototypes between batches, has no form for one example",
    "StrategyTest::test_icarl": "the loss of iCaRL, which keeps outputs between batches, has no form for one example",
    "StrategyTest::test_slda": "a model that reads its outputs from a hook, which writes into the original",
    "StrategyTest::test_feature_replay": "MaskedCrossEntropy, whose mask changes, has no form for one example",
}


def suite():
    """The folder of the suite, which Avalanche's wheel installs as `tests`; None where it is not installed."""
    avalanche = importlib.util.find_spec("avalanche")
    folder = Path(avalanche.origin).parents[1] / "tests" / "training" if avalanche else Path()
    return folder if (folder / FILES[0]).exists() else None


def outcomes(folder, inserted, chosen=LONG):
    here, suite_folder = Path(__file__).parent, suite()
    site = suite_folder.parents[1]
    found = folder / f"inserted_{inserted}.json"
    environment = {
        **os.environ, "FAST_TEST": "true", "OMP_NUM_THREADS": "1", "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "inserted_plugins", "-p", "no:cacheprovider", "-k", chosen,
        "--rootdir", str(site), "--confcutdir", str(site), "-c", os.devnull, "--outcomes", str(found),
        *(["--insert"] if inserted else []), *(str(suite_folder / name) for name in FILES),
    ]
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert found.exists(), finished.stdout + finished.stderr
    return {name.partition("::")[2]: outcome for name, outcome in json.loads(found.read_text()).items()}


@pytest.mark.slow
@pytest.mark.skipif(suite() is None, reason="Avalanche's test suite is not installed")
def test_no_test_of_avalanche_fails_by_plugins_of_strength_0_but_by_a_refusal_before_training(tmp_path):
    inserted = outcomes(tmp_path, True)
    failed = {name: one for name, one in inserted.items() if one["outcome"] == "failed"}
    without = outcomes(tmp_path, False, " or ".join(name.rpartition("::")[2] for name in failed))
    new = {name: one for name, one in failed.items() if without[name]["outcome"] == "passed"}
    assert len(inserted) > 40
    assert {name: one for name, one in new.items() if name not in REFUSED} == {}
    late = {name: one for name, one in new.items() if not (one["hook"] or "").startswith("before_train")}
    assert late == {}
    assert all(one["error"].startswith(("TypeError", "ValueError")) for one in new.values())
    assert set(new) == set(REFUSED)
