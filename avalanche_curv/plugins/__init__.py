"""Avalanche plugins."""

from avalanche_curv.plugins.curvature_ewc import CurvatureEWCPlugin
from avalanche_curv.plugins.mitigator import MitigatorPlugin
from avalanche_curv.plugins.orthogonal_projection import OrthogonalProjectionPlugin
from avalanche_curv.plugins.spectral_reg import SpectralRegPlugin

__all__ = ["CurvatureEWCPlugin", "MitigatorPlugin", "OrthogonalProjectionPlugin", "SpectralRegPlugin"]
