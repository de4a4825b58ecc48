"""What keeps a network able to learn: each mitigator works around the steps of any optimiser."""

from avalanche_curv.core.mitigators.base import Mitigator, Regularizer
from avalanche_curv.core.mitigators.spectral import SpectralRegularizer

__all__ = ["Mitigator", "Regularizer", "SpectralRegularizer"]
