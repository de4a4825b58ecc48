"""What only this experiment trains with: all tasks at once."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.methods import Method


@dataclass(frozen=True)
class Multitask(Method):
    """All tasks at once, as one experience of all examples: the bound, as Avalanche's JointTraining has it."""
