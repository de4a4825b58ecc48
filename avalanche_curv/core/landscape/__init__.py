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
from avalanche_curv.core.landscape.spectrum import Density, Spectrum, SpectrumMethod

__all__ = [
    "Alignment",
    "CurvatureDrift",
    "Density",
    "GramMatrix",
    "Lanczos",
    "Landscape",
    "Spectrum",
    "SpectrumMethod",
    "WholeMatrix",
    "alignment",
    "curvature_drift",
    "landscape",
]
