"""Imports go one way: benchmarks → strategies → plugins, metrics, streams → core → torch, scipy, curvlinops."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import avalanche_curv

PACKAGE = Path(avalanche_curv.__file__).parent
ROOT = PACKAGE.parent
HEIGHT = {"core": 0, "plugins": 1, "metrics": 1, "streams": 1, "loggers": 1, "strategies": 2, "benchmarks": 3}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """The full names that a file imports, `from a import b` as a.b; relative ones from their place."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(name):
    """The part of the house that a name of ours belongs to; None for the names of others."""
    head, _, rest = name.partition(".")
    if head == "benchmarks":
        return "benchmarks"
    if head != "avalanche_curv" or not rest:
        return None
    first = rest.split(".")[0]
    return first if first in HEIGHT else avalanche_curv._LAZY.get(first, "core")


def home(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "benchmarks" if parts[0] == "benchmarks" else parts[1]


def test_importing_the_package_loads_neither_avalanche_nor_anything_that_draws():
    heavy = ["avalanche", "matplotlib", "tensorboard", "torch.utils.tensorboard", "sklearn", "benchmarks"]
    script = f"import sys, avalanche_curv; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", [p for p in FILES if "core" in p.parts], ids=lambda p: p.stem)
def test_the_core_imports_torch_and_scipy_and_nothing_heavier(path):
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "scipy", "jaxtyping", "avalanche_curv"}
    allowed |= {"curvlinops"} if path.name == "_curvlinops.py" else set()
    assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_one_file_alone_imports_curvlinops():
    doors = [p.name for p in FILES if any(name.split(".")[0] == "curvlinops" for name in imported(p))]
    assert doors == ["_curvlinops.py"]


def test_imports_never_go_up():
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in [*FILES, *(ROOT / "benchmarks").rglob("*.py")]
        if path.name != "__init__.py" or path.parent != PACKAGE
        for name in imported(path)
        if part_of(name) in HEIGHT and HEIGHT[part_of(name)] > HEIGHT[home(path)]
    ]
    assert wrong == []


def test_parts_of_one_height_do_not_import_in_a_circle():
    edges = {
        (home(path), part_of(name))
        for path in FILES if path.parent != PACKAGE or path.name != "__init__.py"
        for name in imported(path) if part_of(name) and part_of(name) != home(path)
    }
    remaining = {a for edge in edges for a in edge}
    while remaining:
        free = {a for a in remaining if not any(x == a and y in remaining for x, y in edges)}
        assert free, f"circle among {sorted(remaining)}"
        remaining -= free


def test_every_public_name_can_be_imported_from_the_package():
    for name in avalanche_curv.core.__all__:
        assert getattr(avalanche_curv, name) is getattr(avalanche_curv.core, name)
    assert set(avalanche_curv.__all__) <= set(dir(avalanche_curv))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = avalanche_curv.Nothing
