"""The ends of the scale: nothing kept, everything kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from avalanche.training import Cumulative, JointTraining

from benchmarks.methods.base import Method


@dataclass(frozen=True)
class Plain(Method):
    """Naive fine-tuning."""


@dataclass(frozen=True)
class Joint(Method):
    """Avalanche's Cumulative: trains on all examples so far, an upper bound that stores everything."""

    @property
    def strategy(self) -> type:
        return Cumulative


@dataclass(frozen=True)
class AllAtOnce(Method):
    """Avalanche's JointTraining: one training on all experiences together, the bound of what can be learned."""

    joint: ClassVar[bool] = True

    @property
    def strategy(self) -> type:
        return JointTraining
