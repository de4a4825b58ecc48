"""The experiments by name: every folder of `benchmarks/experiments` that holds an ``experiment.py``.

Nothing is imported until one is asked for, so ``list`` is immediate. The line that it shows of an experiment is the
first of the docstring of its ``experiment.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.errors import UsageError, unknown

if TYPE_CHECKING:
    from benchmarks.harness.experiment import Experiment
    from benchmarks.harness.results import Results
    from benchmarks.harness.terminal import Glance

FOLDER = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Registered:
    """Where an experiment and its report are (``module:attribute``), and what it shows, in one line."""

    target: str
    summary: str
    reporter: str

    @property
    def experiment(self) -> Experiment:
        return _loaded(self.target)

    @property
    def report(self) -> Callable[[Results, Path], str]:
        """report(results, out): Markdown over the results, which may be incomplete, its figures in the folder `out`."""
        return _loaded(self.reporter)

    @property
    def glance(self) -> Glance:
        """What of the report a terminal shows first: ``GLANCE`` beside `report`, where it is defined."""
        from benchmarks.harness.terminal import Glance

        return getattr(import_module(self.reporter.partition(":")[0]), "GLANCE", Glance())


def _loaded(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def discovered(folder: Path, package: str) -> dict[str, Registered]:
    """The experiments in the folders below one, which is the package of that name."""
    found = {path.parent.name: path for path in sorted(folder.glob("*/experiment.py"))}
    return {
        name: Registered(
            f"{package}.{name}.experiment:experiment", _summary(path), f"{package}.{name}.report:report"
        )
        for name, path in found.items()
    }


def _summary(path: Path) -> str:
    """The first line of a module's docstring, which is not imported. Raises ValueError without one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path} needs a docstring, whose first line says what the experiment shows.")
    return text.splitlines()[0].rstrip(".")


def found(name: str, experiments: Mapping[str, Registered]) -> Registered:
    """The experiment of that name. Raises UsageError for any other name."""
    if name not in experiments:
        raise UsageError(unknown("experiment", name, experiments))
    return experiments[name]


EXPERIMENTS = discovered(FOLDER, "benchmarks.experiments")
