"""The empirical risk of past examples at frozen parameters, and what it is made of."""

from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.selection import ParameterSelector

__all__ = ["EmpiricalRisk", "ParameterSelector", "ParameterSpace"]
