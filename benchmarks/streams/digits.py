"""Streams that need no download: those of `avalanche_curv.streams`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def permuted_digits(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche_curv.streams import PermutedDigits
    from benchmarks.streams.memory import repeated

    return repeated(PermutedDigits(5, seed=seed), scenario, experiences)


def rotated_digits(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche_curv.streams import RotatedDigits
    from benchmarks.streams.memory import repeated

    return repeated(RotatedDigits(5, seed=seed), scenario, experiences)


def split_digits(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche_curv.streams import SplitDigits
    from benchmarks.streams.memory import split

    return split(SplitDigits(5, seed=seed), scenario, experiences)


def sine(seed: int, root: Path | None, scenario: str, experiences: int) -> Any:
    from avalanche_curv.streams import SineBoundary
    from benchmarks.streams.memory import repeated

    return repeated(SineBoundary(9, seed=seed), scenario, experiences)
