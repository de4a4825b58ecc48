"""The shape of the loss around a model: its sharpness, trace, ranks and spectral density, and how they change."""

from avalanche_curv.core.landscape.exact import GramMatrix, WholeMatrix
from avalanche_curv.core.landscape.lanczos import Lanczos
from avalanche_curv.core.landscape.landscape import (
    Alignment,
    CurvatureDrift,
    Landscape,
    alignment,
    curvature_drift,
    landscape,
)

__all__ = [
    "Alignment",
    "CurvatureDrift",
    "GramMatrix",
    "Lanczos",
    "Landscape",
    "WholeMatrix",
    "alignment",
    "curvature_drift",
    "landscape",
]
