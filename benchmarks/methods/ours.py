"""The methods of this package."""

from __future__ import annotations

from dataclasses import dataclass

from avalanche.training.plugins import SupervisedPlugin

from avalanche_curv import (
    CurvatureEWCPlugin,
    OrthogonalProjectionPlugin,
    Projection,
    Protection,
    SpectralRegPlugin,
    StepProjection,
)
from avalanche_curv.core import Curvature, Policy, Structure
from benchmarks.methods.base import Method


@dataclass(frozen=True)
class Ours(Method):
    """CurvatureEWC."""

    strength: float
    curvature: Curvature
    structure: Structure
    policy: Policy

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [
            CurvatureEWCPlugin(
                self.strength, curvature=self.curvature, structure=self.structure, policy=self.policy
            )
        ]


@dataclass(frozen=True)
class Spectral(Method):
    """SpectralReg."""

    strength: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [SpectralRegPlugin(self.strength)]


@dataclass(frozen=True)
class Projected(Method):
    """OrthogonalProjection: steps that stay out of what past experiences need."""

    protect: Protection
    projection: Projection = StepProjection()  # noqa: RUF009  a frozen value

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [OrthogonalProjectionPlugin(self.protect, projection=self.projection)]
