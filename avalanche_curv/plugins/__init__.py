"""Avalanche plugins."""

from avalanche_curv.plugins.curvature_ewc import CurvatureEWCPlugin

__all__ = ["CurvatureEWCPlugin"]
