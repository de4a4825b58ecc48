"""Quadratic models of the losses of single examples around one anchor, by Jacobian-vector products."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.operators import factor_of, pieces
from avalanche_curv.core.fidelity.measures import Comparison, GradientProducts, concatenated
from avalanche_curv.core.losses import Factor
from avalanche_curv.core.nested import Nested, split
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.model import half
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.jacobians import (
    Parameters,
    change_of_outputs,
    chunk_size,
    parameters_of,
    pulled_back,
)


class ExampleModels(ABC):
    """Quadratic models of the losses of single examples x of a risk: increase(x) = g_xᵀδ + ½ δᵀ C_x δ around its frozen
    parameters, with δ the displacement from them."""

    risk: EmpiricalRisk

    @abstractmethod
    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        """The quadratic models against the true losses of the frozen past function at other parameters."""


class OutputModels(ExampleModels):
    """The quadratic models with C_x = Jᵀ S Sᵀ J, of any network: u = J δ by one forward-mode product, then ½ ‖Sᵀu‖² and
    Jᵀ S Sᵀ u."""

    def __init__(self, curvature: OutputCurvature, risk: EmpiricalRisk) -> None:
        self.curvature, self.risk = curvature, risk

    @in_own_precision
    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        generator = self.curvature.generator()
        here, there = parameters_of(self.risk), parameters_of(self.risk, parameters)
        step = parameters_of(self.risk, parameters - self.risk.anchor)
        parts = []
        with torch.no_grad():
            for x, y in pieces(self.curvature, self.risk):
                factor = factor_of(self.curvature, self.risk, self.risk.outputs(x), y, generator)
                size = chunk_size(self.risk, 3)
                for (some, targets), part in zip(split((x, y), size), factor.split(size)):
                    parts.append(self._chunk(here, there, step, some, targets, part))
        return joined(parts)

    def _chunk(self, here: dict, there: dict, step: dict, x: Nested, y: Nested, factor: Factor) -> Comparison:
        loss, now = self.risk.loss, outputs_there(self.risk, there, x)
        then, change = change_of_outputs(self.risk, here, x, step)
        residual = loss.gradient(then, y)
        curved, linear, quadratic = output_increase(factor, residual, change)
        true = pulled_back(self.risk, there, x, loss.gradient(now, y)[:, :, None])[:, 0]
        bends, slopes = pulled_back(self.risk, here, x, torch.stack([curved, residual], dim=2)).unbind(1)
        products = GradientProducts.of(true, torch.stack([bends, bends + slopes]))
        actual = loss.per_example(now, y) - loss.per_example(then, y)
        return Comparison.of(products, actual, torch.stack([quadratic, quadratic + linear]))


class ExpandedModels(ExampleModels):
    """The quadratic models of any kind that gives g_x and C_x δ itself (`Curvature.example_expansion`)."""

    def __init__(self, curvature: Curvature, risk: EmpiricalRisk) -> None:
        self.curvature, self.risk = curvature, risk

    @in_own_precision
    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        displacement, there = parameters - self.risk.anchor, parameters_of(self.risk, parameters)
        size = chunk_size(self.risk, 3)
        pieces = (piece for x, y in self.risk for piece in split((x, y), size))
        with torch.no_grad():
            return joined([self._chunk(there, displacement, x, y) for x, y in pieces])

    def _chunk(self, there: Parameters, displacement: Float[Tensor, "P"], x: Nested, y: Nested) -> Comparison:
        loss, now = self.risk.loss, outputs_there(self.risk, there, x)
        slopes, products = self.curvature.example_expansion(self.risk, x, y, displacement)
        true = pulled_back(self.risk, there, x, loss.gradient(now, y)[:, :, None])[:, 0]
        quadratic, linear = half_product(products, displacement), slopes @ displacement
        actual = loss.per_example(now, y) - loss.per_example(self.risk.outputs(x), y)
        gradients = GradientProducts.of(true, torch.stack([products, products + slopes]))
        return Comparison.of(gradients, actual, torch.stack([quadratic, quadratic + linear]))


def outputs_there(risk: EmpiricalRisk, parameters: Parameters, inputs: Nested) -> Float[Tensor, "N C"]:
    """f(inputs) at other parameters, without a graph."""
    with risk.holding(list(parameters.values())):
        return risk.outputs(inputs)


def output_increase(
    factor: Factor, residual: Float[Tensor, "N C"], change: Float[Tensor, "N C"]
) -> tuple[Tensor, Tensor, Tensor]:
    """S Sᵀu, the linear increase (∇_f ℓ)ᵀu and the quadratic increase ½ ‖Sᵀu‖² of each example.

    Args: the `factor` S of the curvature in the outputs, the `residual` ∇_f ℓ at the anchor, the `change` u = J δ of
    the outputs.
    """
    curved = factor.times(change)
    return curved, (residual * change).sum(1), half_product(curved, change)


def half_product(products: Float[Tensor, "N k"], direction: Tensor) -> Float[Tensor, "N"]:
    """½ vᵀ(C v) for each row of products C v with the `direction` v."""
    return half((products * direction).sum(1))


def joined(parts: list[Comparison]) -> Comparison:
    """The comparison of all examples, from the comparisons of consecutive pieces of them."""
    return Comparison(concatenated([p.quadratic for p in parts]), concatenated([p.linear for p in parts]))
