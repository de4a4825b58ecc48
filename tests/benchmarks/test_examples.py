"""Each script of `benchmarks/examples` runs as it stands, on models made from a configuration, and prints numbers in
which the past is seen."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "examples"
PACKAGES = {
    "amp_accumulation": [],
    "hf_trainer": ["transformers", "peft", "accelerate"],
    "lightning_callback": ["lightning"],
    "sb3_ppo": ["stable_baselines3", "gymnasium"],
    "avalanche_hugging_face": ["transformers"],
}
LOSSES = {"hf_trainer", "avalanche_hugging_face"}  # the others print rates
GUESSING = math.log(4)  # one of four topics


def test_every_script_is_listed_here_and_has_at_most_sixty_lines():
    needs_images = "choose_strength"
    paths = [path for path in FOLDER.glob("*.py") if path.stem not in {"__init__", needs_images}]
    scripts = {path.stem: len(path.read_text().splitlines()) for path in paths}
    assert scripts.keys() == PACKAGES.keys()
    assert max(scripts.values()) <= 60
    assert not any("register" in path.read_text().replace("regularizer", "") for path in FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_script_runs_and_with_the_past_the_first_task_is_kept(name, tmp_path, monkeypatch):
    for package in PACKAGES[name]:
        pytest.importorskip(package, reason="needs pip install -e '.[examples]'")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = subprocess.run([sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = re.findall(r"^strength \S+: (.*\d.*)$", ran.stdout, re.MULTILINE)
    without, with_past = ([float(number) for number in re.findall(r"\d+\.\d+", line)] for line in lines)
    if name in LOSSES:
        assert 2 * with_past[0] < without[0]
        assert max(with_past) < GUESSING
    else:
        assert with_past[0] > 1.2 * without[0]
        assert with_past[1:] >= [0.8 * number for number in without[1:]]
