"""Plasticity, the ability of a network to learn: measures of it, and mitigators of its loss."""

from avalanche_curv.plasticity import measures, mitigators
from avalanche_curv.plasticity.measures import *  # noqa: F403
from avalanche_curv.plasticity.mitigators import *  # noqa: F403

__all__ = [*measures.__all__, *mitigators.__all__]
