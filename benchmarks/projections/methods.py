"""What only this experiment trains with: projections, and all tasks at once."""

from __future__ import annotations

from dataclasses import dataclass

from avalanche.training.plugins import SupervisedPlugin

from avalanche_curv import OrthogonalProjectionPlugin, Projection, Protection, Step
from benchmarks.methods import Method


@dataclass(frozen=True)
class Projected(Method):
    """Steps that stay out of what past tasks need."""

    protect: Protection
    projection: Projection = Step()  # noqa: RUF009  a frozen value

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [OrthogonalProjectionPlugin(self.protect, projection=self.projection)]


@dataclass(frozen=True)
class Multitask(Method):
    """All tasks at once, as one experience of all examples: the bound, as Avalanche's JointTraining has it."""

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return []
