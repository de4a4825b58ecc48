"""Criteria in their per-example form, and factors of their curvature in the outputs."""

from avalanche_curv.core.losses.base import ExampleLoss
from avalanche_curv.core.losses.criteria import example_loss
from avalanche_curv.core.losses.factor import Factor
from avalanche_curv.core.losses.function import LossFunction

__all__ = ["ExampleLoss", "Factor", "LossFunction", "example_loss"]
