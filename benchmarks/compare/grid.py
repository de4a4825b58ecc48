"""The methods of a comparison, each at its strength."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import UsageError
from benchmarks.methods import Method, Named, named, strategies

if TYPE_CHECKING:
    from benchmarks.compare import Setting

TUNED = Path(__file__).with_name("strengths.json")  # what `run tune_compare` has found, by stream and scenario


def methods(setting: Setting, names: Sequence[str] | None, strengths: Mapping[str, float]) -> dict[str, Method]:
    """The methods of those names, or all that run in the scenario, by label.

    A strength is that of `strengths`, else the one that was tuned for this stream and scenario, else the default.
    """
    found = {**tuned(setting), **strengths}
    return {
        name: entry.method.with_strength(found[name]) if entry.grid and name in found else entry.method
        for name, entry in chosen(setting, names).items()
    }


def strengths_to_try(setting: Setting, names: Sequence[str] | None) -> dict[str, dict[float, Method]]:
    """For each method that has a grid: its strengths, each with the method there."""
    return {
        name: {strength: entry.method.with_strength(strength) for strength in entry.grid}
        for name, entry in chosen(setting, names).items()
        if entry.grid
    }


def chosen(setting: Setting, names: Sequence[str] | None) -> dict[str, Named]:
    """Raises UsageError for a name that is unknown, and for one that does not run in the scenario."""
    known = strategies(setting.memory)
    if names is None:
        return {name: entry for name, entry in known.items() if setting.scenario in entry.scenarios}
    for name in names:
        reason = named(name).unfit.get(setting.scenario)
        if reason:
            raise UsageError(f"strategy '{name}' does not run {setting.scenario}-incrementally: {reason}")
    return {name: known[name] for name in names}


def tuned(setting: Setting) -> dict[str, float]:
    """The strengths that were tuned for the stream and the scenario; empty where none were."""
    return json.loads(TUNED.read_text(encoding="utf-8")).get(f"{setting.stream}/{setting.scenario}", {})
