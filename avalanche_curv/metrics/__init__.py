"""Avalanche metrics over measurements of the core."""

from avalanche_curv.metrics.fidelity import FidelityMetric, fidelity_metrics
from avalanche_curv.metrics.penalty import PenaltyMetric, penalty_metrics

__all__ = ["FidelityMetric", "PenaltyMetric", "fidelity_metrics", "penalty_metrics"]
