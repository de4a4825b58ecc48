"""The methods of a comparison, each at its strength."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.compare import DEFAULT_STREAM, Config
from benchmarks.harness import UsageError
from benchmarks.methods import Method, Named, named, strategies
from benchmarks.streams import STREAMS

if TYPE_CHECKING:
    from benchmarks.experiments.compare import Setting

TUNED = Path(__file__).with_name("strengths.json")  # what `run tune_compare` has found, by stream and scenario
ELSEWHERE = f"{DEFAULT_STREAM}/{STREAMS[DEFAULT_STREAM].scenarios[0]}"
HERE = "this stream"


def configs(
    setting: Setting, names: Sequence[str] | None, strengths: Mapping[str, float], baseline: str
) -> list[Config]:
    """The methods of those names, or all that run in the scenario.

    A strength is that of `strengths`, else the one that was tuned before for this stream and scenario, else for the
    default stream. Raises UsageError as `chosen` does, also for the baseline.
    """
    chosen(setting, [baseline])
    place = f"{setting.stream}/{setting.scenario}"
    known: dict[str, dict[str, float]] = json.loads(TUNED.read_text(encoding="utf-8"))
    before = place if place in known else ELSEWHERE
    found = {**{name: (value, before) for name, value in known.get(before, {}).items()},
             **{name: (value, HERE) for name, value in strengths.items()}}
    made = []
    for name, entry in chosen(setting, names).items():
        strength, source = found.get(name, (None, None)) if entry.grid else (None, None)
        method = entry.method if strength is None else entry.method.with_strength(strength)
        made.append(Config(name, method, setting, source))
    return made


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
