"""Curvature kinds: which symmetric matrix stands for the second derivative of past loss."""

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError, OutputCurvature
from avalanche_curv.core.curvature.empirical_fisher import BatchedEmpiricalFisher, EmpiricalFisher
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.curvature.ggn import GGN
from avalanche_curv.core.curvature.hessian import Absolute, Clip, Hessian
from avalanche_curv.core.curvature.linear_operator import FromLinearOperator
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.curvature.output_gradient import OutputGradient

__all__ = [
    "GGN",
    "Absolute",
    "BatchedEmpiricalFisher",
    "Clip",
    "Curvature",
    "EmpiricalFisher",
    "Fisher",
    "FromLinearOperator",
    "Hessian",
    "NonFiniteCurvatureError",
    "Operator",
    "OutputCurvature",
    "OutputGradient",
]
