"""The manifest: the grid of a run, and the versions and the machine that it ran on."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness.experiment import Unit, describe, digest
from benchmarks.harness.options import Options
from benchmarks.harness.store import Store, write_atomically

PACKAGES = {
    "torch": "torch",
    "avalanche": "avalanche-lib",
    "curvlinops": "curvlinops-for-pytorch",
    "avalanche_curv": "avalanche-curv",
    "numpy": "numpy",
}


class Manifest:
    """The content of ``manifest.json``, written anew after each unit.

    ``units`` lists the whole grid in its order, with seconds and peak memory of the finished ones (others null).
    ``jobs`` is how many units ran side by side, null where a cluster decided that. ``seconds`` is the time on the clock
    of the last run, ``unit_seconds`` that of all finished units together.
    """

    def __init__(self, store: Store, units: Sequence[Unit], options: Options, command: str, jobs: int | None) -> None:
        self._store = store
        self._entries: dict[str, dict[str, Any]] = {}
        for unit in units:
            self.update(unit)
        self._content: dict[str, Any] = {
            "experiment": units[0].experiment,
            "version": units[0].version,
            "grid": digest(sorted(self._entries)),
            "options": describe(options),
            "command": command,
            "jobs": jobs,
            "threads_per_worker": 1,
            **environment(),
        }

    @property
    def commit(self) -> str | None:
        """The commit, marked where the checkout had changes."""
        commit = self._content["commit"]
        return f"{commit}-dirty" if commit and self._content["dirty"] else commit

    def update(self, unit: Unit) -> None:
        """Read what the store has of a unit."""
        header = self._store.header(unit.digest) or {}
        measured = {key: header.get(key) for key in ("seconds", "peak_memory")}
        self._entries[unit.digest] = {"label": unit.label, "seed": unit.seed, "digest": unit.digest, **measured}

    def write(self, seconds: float) -> None:
        """Write the file; `seconds` have passed since the run began."""
        entries = list(self._entries.values())
        total = sum(entry["seconds"] or 0.0 for entry in entries)
        times = {"seconds": round(seconds, 3), "unit_seconds": round(total, 3)}
        content = {**self._content, **times, "units": entries}
        write_atomically(self._store.manifest, json.dumps(content, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, commit and machine; null for what is unknown."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        **{name: _version(package) for name, package in PACKAGES.items()},
        **git_state(Path(__file__).parent),
        "platform": platform.platform(),
        "device": {"cpu": _processor(), "gpu": gpu},
        "cpus": cpus(),
    }


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_state(folder: Path) -> dict[str, Any]:
    """The commit of a folder and whether it has uncommitted changes; null for both without git or a commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "--verify", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
