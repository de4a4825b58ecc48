"""Experiments that choose a strength for each of their rows first, on seeds and data that they never report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Any, TypeVar

import tyro

from benchmarks.harness.experiment import Experiment
from benchmarks.harness.options import Options
from benchmarks.harness.results import Summary

Key = TypeVar("Key")
FIRST_SEED = 1000  # of tuning


@dataclass(frozen=True)
class TunedOptions(Options):
    """With what tuning needs and finds, which is no option of the command line."""

    tuning: Annotated[bool, tyro.conf.Fixed, tyro.conf.Suppress] = False
    """whether strengths are tried"""
    strengths: Annotated[tuple[tuple[Any, ...], ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """what tuning has found: the strength last, after what it is for"""


class SelfTuned(Experiment):
    """An experiment that is its own prerequisite: with `tuning` its grid has every strength of each row, on data held
    out of training, which run with one seed; without, each row at one of the `strengths` that this has found."""

    options_type = TunedOptions

    def variant(self, options: Any) -> str:
        return "tuning" if options.tuning else ""

    def prerequisite(self, options: Any) -> tuple[Experiment, Options] | None:
        return None if options.tuning else (self, replace(options, tuning=True, seeds=1))


def best(tried: Iterable[tuple[Key, float, Summary | None]], *, least: bool = False) -> dict[Key, float]:
    """Of each key the strength with the largest mean, or with the `least`, among equal ones the smallest strength; none
    of a key that has no finite mean.

    >>> from benchmarks.harness.results import summarise
    >>> best([("a", 1.0, summarise([0.5])), ("a", 10.0, summarise([0.5])), ("b", 1.0, None)])
    {'a': 1.0}
    """
    found: dict[Key, tuple[float, float]] = {}
    for key, strength, score in tried:
        if score is not None and isfinite(score.mean):
            one = score.mean if least else -score.mean, strength
            found[key] = min(found.get(key, one), one)
    return {key: strength for key, (_, strength) in found.items()}
