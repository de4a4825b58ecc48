"""Imports go one way, between files: benchmarks → strategies → plugins, metrics, streams → plasticity → core."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import avalanche_curv

PACKAGE = Path(avalanche_curv.__file__).parent
ROOT = PACKAGE.parent
HEIGHT = {
    "core": 0, "plasticity": 1, "plugins": 2, "metrics": 2, "streams": 2, "loggers": 2, "tensorboard": 2,
    "checkpointing": 2, "strategies": 3, "first_tasks": 3,
    "benchmarks": 4,
}  # fmt: skip
LOOSE = 9  # files in the core outside its rooms, at most
FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def statements(path):
    """The imports of a file, in functions too, each with whether it is for types alone."""
    tree = ast.parse(path.read_text())
    for_types = {id(inner) for node in ast.walk(tree) if is_for_types(node) for inner in ast.walk(node)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [(node, id(node) in for_types) for node in imports]


def imported(path):
    """The full names that a file imports, `from a import b` as a.b; relative ones from their place."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node, _ in statements(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges_between_files(files):
    """By module, the modules that its file imports, in functions too; a package is its `__init__`."""
    known = {module_of(path) for path in files}
    edges = {}
    for path in files:
        found = set()
        for node in (node for node, for_types in statements(path) if not for_types):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & known
            elif node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (full & known) or ({node.module} & known)
        edges[module_of(path)] = found - {module_of(path)}
    return edges


def circle_in(edges):
    """Modules that import each other in a circle, and what imports only those; none where there is no circle."""
    left = dict(edges)
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def part_of(name):
    """The part of the project that a name of ours belongs to; None for the names of others."""
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


def test_the_core_imports_torch_and_scipy_and_nothing_heavier_but_curvlinops_by_one_door():
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "scipy", "jaxtyping", "avalanche_curv"}
    pure = [path for path in FILES if {"core", "plasticity"} & {*path.parts}]
    heavier = {(path.name, name.split(".")[0]) for path in pure for name in imported(path)}
    assert {(file, name) for file, name in heavier if name not in allowed} == {("_curvlinops.py", "curvlinops")}
    assert not any(name.startswith("curvlinops") for path in {*FILES} - {*pure} for name in imported(path))


def test_imports_never_go_up():
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in [*FILES, *(ROOT / "benchmarks").rglob("*.py")]
        if path.name != "__init__.py" or path.parent != PACKAGE
        for name in imported(path)
        if part_of(name) in HEIGHT and HEIGHT[part_of(name)] > HEIGHT[home(path)]
    ]
    assert wrong == []


def test_a_circle_is_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_files_do_not_import_each_other_in_a_circle():
    assert circle_in(edges_between_files([*FILES, *(ROOT / "benchmarks").rglob("*.py")])) == []


def test_rooms_of_the_core_do_not_import_each_other_in_a_circle():
    edges = {}
    for name, found in edges_between_files(FILES).items():
        if name.startswith("avalanche_curv.core."):
            room = name.split(".")[2]
            edges.setdefault(room, set()).update({other.split(".")[2] for other in found} - {room})
    assert circle_in(edges) == []


def test_few_files_of_the_core_stand_outside_of_its_rooms():
    assert len([*(PACKAGE / "core").glob("*.py")]) <= LOOSE


def test_every_public_name_can_be_imported_from_the_package():
    for part in (avalanche_curv.core, avalanche_curv.plasticity):
        for name in part.__all__:
            assert getattr(avalanche_curv, name) is getattr(part, name)
    assert set(avalanche_curv.__all__) <= set(dir(avalanche_curv))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = avalanche_curv.Nothing
