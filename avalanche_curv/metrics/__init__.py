"""Avalanche metrics: each wraps a measurement of the core for any strategy and logger."""

from avalanche_curv.metrics._published import ScalarMetric
from avalanche_curv.metrics.fidelity import FidelityMetric, fidelity_metrics
from avalanche_curv.metrics.gradients import GradientMetric
from avalanche_curv.metrics.landscape import LandscapeMetric, landscape_metrics
from avalanche_curv.metrics.penalty import PenaltyMetric, penalty_metrics
from avalanche_curv.metrics.plasticity import plasticity_metrics
from avalanche_curv.metrics.projection import ProjectionMetric, projection_metrics
from avalanche_curv.metrics.training_accuracy import FromScratch

__all__ = [
    "FidelityMetric",
    "FromScratch",
    "GradientMetric",
    "LandscapeMetric",
    "PenaltyMetric",
    "ProjectionMetric",
    "ScalarMetric",
    "fidelity_metrics",
    "landscape_metrics",
    "penalty_metrics",
    "plasticity_metrics",
    "projection_metrics",
]
